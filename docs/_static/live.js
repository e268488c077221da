// The page docs/live.md: a reader asks a student about a scene, sees its box, shows it to the student and asks again.
(async () => {
  const root = document.getElementById("live");
  const { open, iou, snap, pixelsOf, step, group, rewarded } = IVT_LIVE;
  const { draw: drawScene, expressions, crowded, changed, added, center } = IVT_SCENES;
  const here = document.currentScript?.src ?? location.href;
  let words;
  try {
    words = await open(new URL("live/", here).href);
  } catch (trouble) {
    root.textContent = trouble.message;
    root.className = "live-trouble";
    return;
  }
  IVT_SCENES.open(words);

  // ---------------------------------------------------------------------------------------------- the page
  const SIDES = ["left", "top", "right", "bottom"];
  const GROUPS = ["which one", "size", "color", "shape", "where, or what it is not", "beside what"];
  const MINE = "mine"; // the scene that the reader has changed
  const WORDS = "words"; // an expression of the menus, not of the split
  const field = (name, id) => `<label>${name} <input type="number" id="live-${id}" min="0" max="1000" step="${words.grid}"></label>`;
  const menu = (name, id) => `<label>${name} <select id="live-${id}"></select></label>`;
  const button = (name, id) => `<button type="button" id="live-${id}">${name}</button>`;
  const row = (...parts) => `<div class="explorer-row">${parts.join("")}</div>`;
  const hint = (name) => `<p class="live-hint" data-hint="${name}"></p>`;
  root.innerHTML = `
    ${row(menu("Scene", "scene"), menu("Student", "student"))}${hint("student")}
    ${row(menu("Expression", "expression"))}
    <fieldset id="live-words"><legend>In words of your own: the …</legend>
      ${row(...GROUPS.map((name, k) => `<select id="live-word-${k}" aria-label="${name}"></select>`))}${hint("words")}</fieldset>
    <details id="live-change"><summary>Change the scene</summary>
      <p>Drag a shape on the picture, or choose one here and write where its center is (0 to 1000).</p>
      ${row(menu("Shape", "thing"), button("Add one", "add"), button("Remove this one", "remove"))}
      ${row(menu("color", "color"), menu("kind", "shape"), menu("size", "size"), field("x", "x"), field("y", "y"))}${hint("scene")}
    </details>
    ${row(button("Ask", "ask"), button("", "again"), button("Start again", "restart"),
      '<label><input type="checkbox" id="live-truth" checked> show the true box</label>')}
    <p id="live-status" role="status"></p>
    <div class="explorer-picture live-picture"><img class="dark-light" draggable="false"><svg viewBox="0 0 1000 1000" aria-hidden="true"></svg></div>
    <fieldset id="live-own"><legend></legend>
      <p>Draw it on the picture, or write its sides (0 to 1000).</p>
      ${row(...SIDES.map((side) => field(side, side)), button("", "show"))}${hint("own")}
    </fieldset>
    <ol class="live-steps" start="0"></ol>${hint("steps")}
    ${row(button(`Sample ${words.generations} answers to the last question`, "sample"))}${hint("sample")}
    <table class="live-group" hidden><caption></caption>
      <thead><tr>${["answer", "IoU", "reward", "advantage"].map((name) => `<th scope="col">${name}</th>`).join("")}</tr></thead>
      <tbody></tbody></table>`;
  const part = (name) => root.querySelector(name);
  const [sceneMenu, student, expression, truth, thingMenu] =
    ["scene", "student", "expression", "truth", "thing"].map((name) => part(`#live-${name}`));
  const wordMenus = GROUPS.map((_, k) => part(`#live-word-${k}`));
  const sides = SIDES.map((side) => part(`#live-${side}`));
  const place = part(".live-picture");
  const status = (text) => (part("#live-status").textContent = text);
  const list = (box) => `[${box.join(", ")}]`;
  const option = (text, value) => Object.assign(document.createElement("option"), { textContent: text, value });
  const offer = (select, texts, values = texts) => select.replaceChildren(...texts.map((text, i) => option(text, values[i])));
  offer(sceneMenu, words.scenes.map((_, i) => `${i + 1} of ${words.scenes.length}`), words.scenes.map((_, i) => i));
  offer(student, Object.values(words.students), Object.keys(words.students));
  offer(part("#live-color"), Object.keys(words.drawing.colors));
  offer(part("#live-shape"), words.drawing.shapes);
  offer(part("#live-size"), Object.keys(words.drawing.sides));

  // What to look for stands below the page as a list; each sentence of it goes to what it is about.
  const listed = document.querySelector(".live-hints");
  const sentences = [...(listed?.querySelectorAll("li") ?? [])].map((item) => [...item.childNodes]);
  const about = [...Object.keys(words.students), "words", "scene", "own", "steps", "sample"];
  const hints = Object.fromEntries(about.map((name, i) => [name, sentences[i] ?? []]));
  root.querySelectorAll(".live-hint").forEach((place) => place.replaceChildren(...(hints[place.dataset.hint] ?? [])));
  listed?.remove();

  let scene; // {things, background, questions}, and "image" where it is one of the split's
  let mine; // the reader's own
  let pixels; // of the scene, without a box
  let meanings; // every expression of the menus in this scene, once they are needed
  let meant; // the one that is chosen
  let lastAsked; // the expression of the split that was chosen last
  let steps = [];
  let sampled = []; // answers to the last question
  let asking = false;
  const closer = () => student.value === words.closer;
  const ownWords = () => expression.value === WORDS;
  const full = () => steps.length > words.turns;
  const changing = () => part("#live-change").open && !steps.length && !asking;

  // The question: {expression, truth}; null while the menus hold none.
  function question() {
    if (!ownWords()) return scene.questions[expression.value];
    return meant ? { expression: meant.text, truth: scene.things[meant.target].box } : null;
  }

  function told({ box, part: seen }) {
    if (!box) return "no box in the answer";
    const back = seen[2] - seen[0] < 1000 ? `in the whole scene ${list(box)}, ` : "";
    return `${back}IoU ${iou(box, question().truth).toFixed(2)}`;
  }

  // ---------------------------------------------------------------------------------------------- what is drawn
  function canvas(shown, alt) {
    const made = document.createElement("canvas");
    Object.assign(made, { width: words.width, height: words.height });
    made.getContext("2d").putImageData(new ImageData(shown, words.width, words.height), 0, 0);
    made.setAttribute("role", "img");
    made.setAttribute("aria-label", alt);
    return made;
  }

  function rect(corners, look) {
    const shape = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const [x, y, right, bottom] = corners;
    Object.entries({ x, y, width: right - x, height: bottom - y, class: look })
      .forEach(([name, value]) => shape.setAttribute(name, value));
    return shape;
  }

  // The box in the four fields, on the student's grid; null while it is none.
  function own() {
    const box = sides.map((field) => (field.value === "" ? NaN : Number(field.value)));
    return box.every((v) => v >= 0 && v <= 1000) && box[0] < box[2] && box[1] < box[3] ? snap(box) : null;
  }

  function draw() {
    const last = steps.at(-1);
    const asked = question();
    const shapes = [[last?.box, "answer"], [last && truth.checked && asked.truth, "truth"], [own(), "own"]];
    shapes.unshift([last && closer() && last.fed && last.part, "part"], ...sampled.map(({ box }) => [box, "sampled"]));
    shapes.push([changing() && scene.things[thingMenu.value]?.box, "own"]);
    part(".live-picture svg").replaceChildren(...shapes.filter(([box]) => box).map(([box, look]) => rect(box, look)));
    const named = sceneMenu.value === MINE ? "Your scene" : `Scene ${Number(sceneMenu.value) + 1}`;
    part(".live-picture img").alt = `${named}, “${asked?.expression ?? ""}”` +
      (last ? `: the answer of step ${steps.length - 1} is ${last.box ? list(last.box) : "no box"}, ${told(last)}.` : ".") +
      (last && truth.checked ? ` The true box is ${list(asked.truth.map(Math.round))}.` : "");
    part("#live-again").textContent = closer() ? "Look closer at its box" : "Show it its box and ask again";
    part("#live-show").textContent = closer() ? "Look closer at this box" : "Show it this box and ask again";
    part("#live-own legend").textContent = closer() ? "Look closer at a box of your own" : "Show it a box of your own";
    part("#live-ask").disabled = asking || steps.length > 0 || !asked || !pixels;
    part("#live-again").disabled = asking || !steps.length || full();
    part("#live-show").disabled = asking || !steps.length || full() || !own();
    part("#live-sample").disabled = asking || !steps.length;
    part("#live-own").hidden = !steps.length || full();
    part("#live-words").hidden = !ownWords();
    part('[data-hint="steps"]').hidden = part('[data-hint="sample"]').hidden = !steps.length;
    part('[data-hint="student"]').replaceChildren(...hints[student.value]);
    [...root.querySelectorAll("#live-change :is(select, input, button), #live-words select"), sceneMenu, student, expression,
      part("#live-restart")].forEach((control) => (control.disabled = asking));
    part("#live-add").disabled ||= scene.things.length >= words.drawing.things;
    part("#live-remove").disabled ||= scene.things.length < 2;
    place.classList.toggle("drawable", (steps.length > 0 && !full()) || changing());
    part(".live-steps").replaceChildren(...steps.map((made, t) => {
      const line = document.createElement("li");
      const [beside, text, score] = ["div", "p", "p"].map((name) => document.createElement(name));
      const seen = closer() && made.fed ? `the part ${list(made.part)} of the scene, enlarged` :
        made.fed ? `the scene with the box ${list(made.fed)}` : t ? "the scene, with no box" : "the scene";
      text.textContent = made.text;
      score.textContent = told(made).replace(/^./, (letter) => letter.toUpperCase());
      score.className = "live-score";
      score.style.setProperty("--share", iou(made.box, asked.truth));
      beside.append(text, score);
      line.append(canvas(made.shown, `Shown at step ${t}: ${seen}.`), beside);
      return line;
    }));
    drawGroup();
  }

  function drawGroup() {
    const table = part(".live-group");
    table.hidden = !sampled.length;
    if (!sampled.length) return;
    const rows = rewarded(sampled, question().truth);
    table.querySelector("caption").textContent = `${sampled.length} answers to the question of step ${steps.length - 1}, ` +
      `drawn at temperature ${words.temperature}. Reward: IoU + ${words.format_bonus} for a valid box. ` +
      "Advantage: reward minus the mean of the group, divided by its spread.";
    table.querySelector("tbody").replaceChildren(...sampled.map((answer, k) => {
      const line = document.createElement("tr");
      const values = [iou(answer.box, question().truth), rows[k].reward, rows[k].advantage].map((v) => v.toFixed(2));
      line.append(...[answer.text, ...values].map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return line;
    }));
  }

  // ---------------------------------------------------------------------------------------------- asking
  // Does what takes a while, and then says what `task` returns: a sentence.
  async function wait(task) {
    const pressed = document.activeElement;
    asking = true;
    sampled = [];
    status(steps.length ? "The student looks again …" : "The student looks …");
    draw();
    await new Promise((done) => setTimeout(done, 20)); // the page is painted first
    const begun = performance.now();
    try {
      const said = await task();
      status(`${said} (${((performance.now() - begun) / 1000).toFixed(1)} s)`);
    } catch (trouble) {
      status(trouble.message);
    }
    asking = false;
    draw();
    if (root.contains(pressed)) { // a button that was disabled has lost the focus
      [pressed, part("#live-again"), part("#live-restart")].find((button) => !button.disabled).focus({ preventScroll: true });
    }
  }

  const ask = (box) => wait(async () => {
    const made = await step(student.value, pixels, question().expression, steps, box);
    steps = [...steps, made];
    const last = full() ? ` That was the last of ${words.turns} refinements.` : "";
    return `Step ${steps.length - 1}, ${told(made)}: ${made.text}${last}`;
  });

  const sample = () => wait(async () => {
    sampled = await group(student.value, steps);
    return `${sampled.length} answers were sampled; they stand in the table below the steps.`;
  });

  function restart() {
    steps = [];
    sampled = [];
    sides.forEach((field) => (field.value = ""));
    status(!question() ? "No expression of the menus means one shape alone here: change the scene." :
      sceneMenu.value === MINE && crowded(scene) ? "Two shapes overlap more than in any scene that the student has learned from." :
        "Choose a scene, an expression and a student, and ask.");
    draw();
  }

  // ---------------------------------------------------------------------------------------------- words
  // Sets the menus to the expression of theirs that begins with these groups, and else is most like the one before.
  function mean(groups) {
    meanings ??= expressions(scene);
    const now = (meant ?? meanings.find(({ text }) => text === lastAsked))?.groups ?? [];
    const alike = ({ groups: others }) => now.filter((group, k) => group === others[k]).length;
    const said = meanings.filter((meaning) => groups.every((group, k) => group === meaning.groups[k]));
    const rank = (meaning) => 100 * alike(meaning) - meaning.text.split(" ").length;
    meant = said.reduce((best, meaning) => (best && rank(best) >= rank(meaning) ? best : meaning), undefined);
    wordMenus.forEach((select, k) => {
      const fitting = meanings.filter((meaning) => meant.groups.slice(0, k).every((group, i) => group === meaning.groups[i]));
      const values = [...new Set(fitting.map((meaning) => meaning.groups[k]))];
      offer(select, values.map((value) => value || "–"), values);
      select.value = meant?.groups[k] ?? "";
    });
  }

  function chooseExpression() {
    if (ownWords()) mean([]);
    else {
      meant = undefined;
      lastAsked = question().expression;
    }
    restart();
  }

  // ---------------------------------------------------------------------------------------------- scenes
  function take(chosen, address) {
    scene = chosen;
    meanings = undefined;
    part(".live-picture img").src = address;
    const texts = [...scene.questions.map(({ expression: text }) => text), "in words of your own …"];
    offer(expression, texts, [...scene.questions.keys(), WORDS]);
    offerThings();
    chooseExpression();
  }

  async function chooseScene() {
    if (sceneMenu.value === MINE) return show(mine);
    const chosen = words.scenes[sceneMenu.value];
    pixels = undefined;
    take(chosen, chosen.image);
    await part(".live-picture img").decode().catch(() => {}); // another scene was chosen meanwhile
    if (scene === chosen) pixels = pixelsOf(part(".live-picture img"));
    draw();
  }

  // Shows the reader's own scene.
  function show({ background, things }) {
    mine = { background, things, questions: [] };
    pixels = drawScene(mine, words.width);
    if (!sceneMenu.querySelector(`[value="${MINE}"]`)) sceneMenu.append(option("yours", MINE));
    sceneMenu.value = MINE;
    take(mine, canvas(pixels, "").toDataURL());
  }

  function offerThings(chosen = Math.min(Number(thingMenu.value || 0), scene.things.length - 1)) {
    offer(thingMenu, scene.things.map(({ color, shape }, i) => `${i + 1}: ${color} ${shape}`), [...scene.things.keys()]);
    thingMenu.value = chosen;
    const thing = scene.things[chosen];
    ["color", "shape", "size"].forEach((name) => (part(`#live-${name}`).value = thing[name]));
    ["x", "y"].forEach((name, k) => (part(`#live-${name}`).value = Math.round(center(thing)[k])));
  }

  const change = (news) =>
    show({ ...scene, things: scene.things.map((thing, i) => (i === Number(thingMenu.value) ? changed(thing, news) : thing)) });

  part("#live-add").addEventListener("click", () => {
    const thing = added(scene);
    if (!thing) return status("There is no room for one more shape: remove one, or make one smaller.");
    show({ ...scene, things: [...scene.things, thing] });
    offerThings(scene.things.length - 1);
    draw();
  });
  part("#live-remove").addEventListener("click", () =>
    show({ ...scene, things: scene.things.filter((_, i) => i !== Number(thingMenu.value)) }));
  for (const name of ["color", "shape", "size"]) {
    part(`#live-${name}`).addEventListener("change", (event) => change({ [name]: event.target.value }));
  }
  for (const name of ["x", "y"]) {
    part(`#live-${name}`).addEventListener("change", () => change({ center: ["x", "y"].map((k) => Number(part(`#live-${k}`).value)) }));
  }
  thingMenu.addEventListener("change", () => {
    offerThings();
    draw();
  });
  part("#live-change").addEventListener("toggle", draw);

  // ---------------------------------------------------------------------------------------------- pointer
  // With the mouse, a pen or a finger a shape is moved before the first question, and a box is drawn after it.
  let corner, grip;
  const at = (event) => {
    const { left, top, width, height } = place.getBoundingClientRect();
    return [(event.clientX - left) / width, (event.clientY - top) / height].map((v) => Math.min(1, Math.max(0, v)) * 1000);
  };
  place.addEventListener("pointerdown", (event) => {
    const [x, y] = at(event);
    if (changing()) {
      const touched = scene.things.findLastIndex(({ box }) => box[0] <= x && x <= box[2] && box[1] <= y && y <= box[3]);
      if (touched < 0) return;
      offerThings(touched);
      draw();
      const [u, v] = center(scene.things[touched]);
      grip = [x - u, y - v];
    } else if (steps.length && !full() && !asking) corner = [x, y];
    else return;
    place.setPointerCapture(event.pointerId);
  });
  place.addEventListener("pointermove", (event) => {
    const other = at(event);
    if (grip) return change({ center: other.map((v, k) => v - grip[k]) });
    if (!corner) return;
    const box = snap([0, 1].map((k) => Math.min(corner[k], other[k])).concat([0, 1].map((k) => Math.max(corner[k], other[k]))));
    sides.forEach((field, k) => (field.value = box[k]));
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) place.addEventListener(end, () => (corner = grip = undefined));

  sceneMenu.addEventListener("change", chooseScene);
  expression.addEventListener("change", chooseExpression);
  wordMenus.forEach((select, k) => select.addEventListener("change", () => {
    mean([...meant.groups.slice(0, k), select.value]);
    restart();
  }));
  student.addEventListener("change", restart);
  truth.addEventListener("change", draw);
  sides.forEach((field) => field.addEventListener("input", draw));
  part("#live-ask").addEventListener("click", () => ask());
  part("#live-again").addEventListener("click", () => ask());
  part("#live-sample").addEventListener("click", sample);
  part("#live-show").addEventListener("click", () => ask(own()));
  part("#live-restart").addEventListener("click", restart);
  await chooseScene();
})();
