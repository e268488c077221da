// The page docs/live.md: a reader asks a student about a scene, sees its box, shows it to the student and asks again.
(async () => {
  const root = document.getElementById("live");
  const { open, toLoad, iou, snap, pixelsOf, step, group, rewarded } = IVT_LIVE;
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
  const GROUPS = ["which one", "size", "color", "shape", "where, or what not", "beside what"]; // of the words in a menu
  const MINE = "mine"; // the scene that the reader has changed
  const WORDS = "words"; // an expression of the menus, not of the split
  const field = (name, id) => `<label>${name} <input type="number" id="live-${id}" min="0" max="1000" step="${words.grid}"></label>`;
  const menu = (name, id) => `<label>${name} <select id="live-${id}"></select></label>`;
  const button = (name, id) => `<button type="button" id="live-${id}">${name}</button>`;
  const row = (...parts) => `<div class="explorer-row">${parts.join("")}</div>`;
  const hint = (name) => `<p class="live-hint" data-hint="${name}"></p>`;
  root.innerHTML = `
    <div class="live-main"><div>
      ${row(menu("Scene", "scene"), menu("Student", "student"))}${hint("student")}
      ${row(menu("Expression", "expression"))}
    </div>
    <div class="explorer-picture live-picture"><img class="dark-light" draggable="false"><svg viewBox="0 0 1000 1000" aria-hidden="true"></svg></div>
    <div>
      <p id="live-question"></p>
      ${row(button("Ask", "ask"), button("", "again"), button("Start again", "restart"),
        '<label><input type="checkbox" id="live-truth" checked> show the true box</label>')}
      <p id="live-status" role="status"></p>
      <fieldset id="live-words"><legend>Put the words together</legend>
        ${row(...GROUPS.map((name, k) => `<select id="live-word-${k}" aria-label="${name}"></select>`))}${hint("words")}</fieldset>
      <details id="live-change"><summary>Change the scene</summary>
        <p>Before you ask, drag a shape on the picture, or choose one here and write where its center is (0 to 1000). Choose a
          number above to have that scene back.</p>
        ${row(menu("Shape", "thing"), button("Add one", "add"), button("Remove this one", "remove"))}
        ${row(menu("color", "color"), menu("kind", "shape"), menu("size", "size"), field("x", "x"), field("y", "y"))}${hint("scene")}
      </details>
      <fieldset id="live-own"><legend></legend>
        <p>Write its sides (0 to 1000), or draw it on the picture<span class="live-touch">:
          <label><input type="checkbox" id="live-draw"> draw with the finger</label></span>.</p>
        ${row(...SIDES.map((side) => field(side, side)), button("", "show"))}<p id="live-trouble"></p>${hint("own")}
      </fieldset>
    </div></div>
    <ol class="live-steps" start="0"></ol>${hint("steps")}
    <table class="live-compared" hidden><caption>The IoU of each step, for the question above</caption><thead></thead><tbody></tbody></table>
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
  const drawing = () => steps.length > 0 && !full() && !asking; // a box of the reader's own
  const compared = new Map(); // the IoUs of each student's steps
  let corner, grip; // where a box was begun, and where a shape was taken, by a pointer that is down

  // The question: {expression, truth}; null while the menus hold none.
  function question() {
    if (!ownWords()) return scene.questions[expression.value];
    return meant ? { expression: meant.text, truth: scene.things[meant.target].box } : null;
  }

  // How an answer fits; and what was shown before it.
  function told({ box, part: seen }) {
    if (!box) return "wrong, no box in the answer";
    const back = seen[2] - seen[0] < 1000 ? `; in the whole scene ${list(box)}` : "";
    const fits = iou(box, question().truth);
    return `${fits >= words.right ? "right" : "wrong"}, IoU ${fits.toFixed(2)}${back}`;
  }

  function shownAt({ fed, part: seen }, step) {
    if (!step) return "the scene";
    if (!fed) return "the scene, with no box";
    if (!closer()) return `the scene with the box ${list(fed)}`;
    return seen[2] - seen[0] < 1000 ? `the part ${list(seen)} of the scene, enlarged` : "the whole scene, for the box is large";
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
    if (changing()) {
      shapes.push([scene.things[thingMenu.value]?.box, "part"], ...scene.things.map(({ box }) => [box, "grip"]));
    }
    part(".live-picture svg").replaceChildren(...shapes.filter(([box]) => box).map(([box, look]) => rect(box, look)));
    part("#live-question").textContent = asked ? `Where is ${asked.expression}?` : "";
    const named = sceneMenu.value === MINE ? "Your scene" : `Scene ${Number(sceneMenu.value) + 1}`;
    part(".live-picture img").alt = `${named}, “${asked?.expression ?? ""}”` +
      (last ? `: the answer of step ${steps.length - 1}${last.box ? `, ${list(last.box)},` : ""} is ${told(last)}.` : ".") +
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
    place.classList.toggle("drawable", drawing());
    place.classList.toggle("touched", drawing() && part("#live-draw").checked);
    part("#live-trouble").textContent = sides.every(({ value }) => value !== "") && !own() ?
      "These are no box: left is less than right, top less than bottom, and all are from 0 to 1000." : "";
    part(".live-steps").replaceChildren(...steps.map((made, t) => {
      const line = document.createElement("li");
      const [beside, seen, text, score] = ["div", "p", "p", "p"].map((name) => document.createElement(name));
      seen.textContent = `Shown: ${shownAt(made, t)}`;
      seen.className = "live-seen";
      text.textContent = made.text;
      text.className = "live-text";
      score.textContent = told(made).replace(/^./, (letter) => letter.toUpperCase());
      score.className = "live-score";
      score.style.setProperty("--share", iou(made.box, asked.truth));
      beside.append(seen, text, score);
      line.append(frame(made, t, asked), beside);
      return line;
    }));
    drawGroup();
    drawCompared();
  }

  // What was shown at a step, with the answer to it and the truth.
  function frame(made, t, asked) {
    const framed = document.createElement("div");
    const over = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const [x, y, right, bottom] = made.part;
    over.setAttribute("viewBox", [x, y, right - x, bottom - y].join(" "));
    over.setAttribute("aria-hidden", "true");
    over.append(...[[made.box, "answer"], [truth.checked && asked.truth, "truth"]].filter(([box]) => box).map(([box, look]) => rect(box, look)));
    framed.className = "live-frame";
    framed.append(canvas(made.shown, `Shown at step ${t}: ${shownAt(made, t)}.`), over);
    return framed;
  }

  // The steps of every student that was asked this question.
  function drawCompared() {
    const table = part(".live-compared");
    table.hidden = compared.size < 2;
    const most = Math.max(0, ...[...compared.values()].map((values) => values.length));
    const cells = (name, texts) => texts.map((text) => Object.assign(document.createElement(name), { textContent: text }));
    const lines = [...compared].map(([name, values]) => ["td", [words.students[name], ...values.map((v) => v.toFixed(2))]]);
    const [head, ...body] = [["th", ["student", ...Array.from({ length: most }, (_, t) => `step ${t}`)]], ...lines]
      .map(([name, texts]) => {
        const line = document.createElement("tr");
        line.append(...cells(name, texts));
        return line;
      });
    table.querySelector("thead").replaceChildren(head);
    table.querySelector("tbody").replaceChildren(...body);
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
      const fits = answer.box ? iou(answer.box, question().truth).toFixed(2) : "no box";
      const values = [rows[k].reward, rows[k].advantage].map((v) => v.toFixed(2));
      line.append(...[answer.text, fits, ...values].map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return line;
    }));
  }

  // ---------------------------------------------------------------------------------------------- asking
  // Does what takes a while, and then says what `task` returns: a sentence.
  async function wait(task) {
    const pressed = document.activeElement;
    asking = true;
    corner = grip = undefined;
    sampled = [];
    const megabytes = toLoad(student.value);
    status(megabytes ? `The student is loaded, once: ${megabytes.toFixed(0)} MB …` : steps.length ? "The student looks again …" : "The student looks …");
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
    (sampled.length ? part(".live-group") : place).scrollIntoView({ block: "nearest" });
  }

  const ask = (box) => wait(async () => {
    const made = await step(student.value, pixels, question().expression, steps, box);
    steps = [...steps, made];
    compared.set(student.value, steps.map(({ box }) => iou(box, question().truth)));
    const last = full() ? ` That was the last of ${words.turns} refinements.` : "";
    return `Step ${steps.length - 1} is ${told(made)}.${last}`;
  });

  const sample = () => wait(async () => {
    sampled = await group(student.value, steps);
    return `${sampled.length} answers were sampled; they stand in the table below the steps.`;
  });

  // Begins the question anew; `another`: it is another one, or about another scene.
  function restart(another = false) {
    corner = undefined;
    steps = [];
    sampled = [];
    if (another) compared.clear();
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
      offer(select, values.map((value) => value || `(${GROUPS[k]})`), values);
      select.value = meant?.groups[k] ?? "";
    });
  }

  function chooseExpression() {
    if (ownWords()) mean([]);
    else {
      meant = undefined;
      lastAsked = question().expression;
    }
    restart(true);
  }

  // ---------------------------------------------------------------------------------------------- scenes
  function take(chosen, address) {
    scene = chosen;
    meanings = undefined;
    part(".live-picture img").src = address;
    const texts = [...scene.questions.map(({ expression: text }) => text), "put the words together …"];
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
    if (part("#live-add").disabled) thingMenu.focus();
  });
  part("#live-remove").addEventListener("click", () => {
    show({ ...scene, things: scene.things.filter((_, i) => i !== Number(thingMenu.value)) });
    if (part("#live-remove").disabled) thingMenu.focus();
  });
  for (const name of ["color", "shape", "size"]) {
    part(`#live-${name}`).addEventListener("change", (event) => change({ [name]: event.target.value }));
  }
  for (const name of ["x", "y"]) {
    part(`#live-${name}`).addEventListener("change", () => {
      const written = ["x", "y"].map((k) => part(`#live-${k}`).value);
      if (written.includes("")) offerThings(); // as it was
      else change({ center: written.map(Number) });
    });
  }
  thingMenu.addEventListener("change", () => {
    offerThings();
    draw();
  });
  part("#live-change").addEventListener("toggle", draw);

  // ---------------------------------------------------------------------------------------------- pointer
  // With the mouse, a pen or a finger a shape is moved before the first question, and a box is drawn after it.
  const at = (event) => {
    const { left, top, width, height } = place.getBoundingClientRect();
    return [(event.clientX - left) / width, (event.clientY - top) / height].map((v) => Math.min(1, Math.max(0, v)) * 1000);
  };
  place.addEventListener("pointerdown", (event) => {
    if (!event.isPrimary || event.button) return;
    const [x, y] = at(event);
    if (changing()) {
      const touched = scene.things.findLastIndex(({ box }) => box[0] <= x && x <= box[2] && box[1] <= y && y <= box[3]);
      if (touched < 0) return;
      offerThings(touched);
      draw();
      const [u, v] = center(scene.things[touched]);
      grip = [x - u, y - v];
    } else if (drawing() && (event.pointerType === "mouse" || part("#live-draw").checked)) corner = [x, y];
    else return;
    place.setPointerCapture(event.pointerId);
  });
  place.addEventListener("pointermove", (event) => {
    if (!event.isPrimary) return;
    const other = at(event);
    if (grip) return change({ center: other.map((v, k) => v - grip[k]) });
    if (!corner || [0, 1].some((k) => Math.abs(other[k] - corner[k]) < words.grid)) return;
    const box = snap([0, 1].map((k) => Math.min(corner[k], other[k])).concat([0, 1].map((k) => Math.max(corner[k], other[k]))));
    sides.forEach((field, k) => (field.value = box[k]));
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) place.addEventListener(end, () => (corner = grip = undefined));

  sceneMenu.addEventListener("change", chooseScene);
  expression.addEventListener("change", chooseExpression);
  wordMenus.forEach((select, k) => select.addEventListener("change", () => {
    mean([...meant.groups.slice(0, k), select.value]);
    restart(true);
  }));
  student.addEventListener("change", () => restart());
  part("#live-draw").addEventListener("change", draw);
  truth.addEventListener("change", draw);
  sides.forEach((field) => {
    field.addEventListener("input", draw);
    field.addEventListener("keydown", ({ key }) => key === "Enter" && part("#live-show").click());
  });
  part("#live-ask").addEventListener("click", () => ask());
  part("#live-again").addEventListener("click", () => ask());
  part("#live-sample").addEventListener("click", sample);
  part("#live-show").addEventListener("click", () => ask(own()));
  part("#live-restart").addEventListener("click", () => restart());
  await chooseScene();
})();
