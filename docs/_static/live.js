// The page docs/live.md: a reader asks a student, sees its box, shows it to the student and asks again.
(async () => {
  const root = document.getElementById("live");
  const { open, iou, snap, pixelsOf, step, group, rewarded } = IVT_LIVE;
  const here = document.currentScript?.src ?? location.href;
  let words;
  try {
    words = await open(new URL("live/", here).href);
  } catch (trouble) {
    root.textContent = trouble.message;
    root.className = "live-trouble";
    return;
  }

  const SIDES = ["left", "top", "right", "bottom"];
  const number = (side) => `<label>${side} <input type="number" id="live-${side}" min="0" max="1000" step="${words.grid}"></label>`;
  root.innerHTML = `
    <div class="explorer-row">
      <label>Scene <select id="live-scene"></select></label>
      <label>Student <select id="live-student"></select></label>
    </div>
    <div class="explorer-row"><label>Expression <select id="live-expression"></select></label></div>
    <div class="explorer-row">
      <button type="button" id="live-ask">Ask</button>
      <button type="button" id="live-again">Show it its box and ask again</button>
      <button type="button" id="live-restart">Start again</button>
      <label><input type="checkbox" id="live-truth" checked> show the true box</label>
    </div>
    <p id="live-status" role="status"></p>
    <div class="explorer-picture live-picture"><img class="dark-light" draggable="false"><svg viewBox="0 0 1000 1000" aria-hidden="true"></svg></div>
    <fieldset id="live-own"><legend>Show it a box of your own</legend>
      <p>Draw it on the picture, or write its sides (0 to 1000).</p>
      <div class="explorer-row">${SIDES.map(number).join("")}
        <button type="button" id="live-show">Show it this box and ask again</button></div>
    </fieldset>
    <ol class="live-steps" start="0"></ol>
    <div class="explorer-row">
      <button type="button" id="live-sample">Sample ${words.generations} answers to the last question</button></div>
    <table class="live-group" hidden><caption></caption>
      <thead><tr>${["answer", "IoU", "reward", "advantage"].map((name) => `<th scope="col">${name}</th>`).join("")}</tr></thead>
      <tbody></tbody></table>`;
  const part = (name) => root.querySelector(name);
  const [scene, student, expression, truth] =
    ["#live-scene", "#live-student", "#live-expression", "#live-truth"].map(part);
  const sides = SIDES.map((side) => part(`#live-${side}`));
  const status = (text) => (part("#live-status").textContent = text);
  const option = (text, value) => Object.assign(document.createElement("option"), { textContent: text, value });
  scene.append(...words.scenes.map((_, i) => option(`${i + 1} of ${words.scenes.length}`, i)));
  student.append(...Object.entries(words.students).map(([name, label]) => option(label, name)));

  let steps = [];
  let sampled = []; // answers to the last question
  let asking = false;
  let pixels; // of the scene, without a box
  const question = () => words.scenes[scene.value].questions[expression.value];
  const told = ({ box }) => (box ? `IoU ${iou(box, question().truth).toFixed(2)}` : "no box in the answer");

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
    const full = steps.length > words.turns;
    const picture = part(".live-picture img");
    const shapes = [[last?.box, "answer"], [last && truth.checked && question().truth, "truth"], [own(), "own"]];
    shapes.unshift(...sampled.map(({ box }) => [box, "sampled"]));
    part(".live-picture svg").replaceChildren(...shapes.filter(([box]) => box).map(([box, look]) => rect(box, look)));
    picture.alt = `Scene ${Number(scene.value) + 1}, “${question().expression}”` +
      (last ? `: the answer of step ${steps.length - 1} is ${last.box ? JSON.stringify(last.box) : "no box"}, ${told(last)}.` : ".") +
      (last && truth.checked ? ` The true box is ${JSON.stringify(question().truth.map(Math.round))}.` : "");
    part("#live-ask").disabled = asking || steps.length > 0;
    part("#live-again").disabled = asking || !steps.length || full;
    part("#live-show").disabled = asking || !steps.length || full || !own();
    part("#live-sample").disabled = asking || !steps.length;
    part("#live-own").hidden = !steps.length || full;
    part("#live-restart").disabled = scene.disabled = student.disabled = expression.disabled = asking;
    part(".live-picture").classList.toggle("drawable", steps.length > 0 && !full);
    part(".live-steps").replaceChildren(...steps.map((made, t) => {
      const line = document.createElement("li");
      const [beside, text, score] = ["div", "p", "p"].map((name) => document.createElement(name));
      const shown = !t ? "the scene" : made.fed ? `the scene with the box ${JSON.stringify(made.fed)}` : "the scene, with no box";
      text.textContent = made.text;
      score.textContent = told(made);
      score.className = "live-score";
      score.style.setProperty("--share", iou(made.box, question().truth));
      beside.append(text, score);
      line.append(canvas(made.shown, `Shown at step ${t}: ${shown}.`), beside);
      return line;
    }));
    drawGroup();
  }

  function drawGroup() {
    const table = part(".live-group");
    table.hidden = !sampled.length;
    const rows = rewarded(sampled, question().truth);
    table.querySelector("caption").textContent = `${sampled.length} answers to the question of step ${steps.length - 1}, ` +
      `drawn at temperature ${words.temperature}. Reward: IoU + ${words.format_bonus} for a valid box. ` +
      "Advantage: reward minus the mean of the group, divided by its spread.";
    table.querySelector("tbody").replaceChildren(...sampled.map((answer, k) => {
      const row = document.createElement("tr");
      const values = [iou(answer.box, question().truth), rows[k].reward, rows[k].advantage].map((v) => v.toFixed(2));
      row.append(...[answer.text, ...values].map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return row;
    }));
  }

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
    const last = steps.length > words.turns ? ` That was the last of ${words.turns} refinements.` : "";
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
    status("Choose a scene, an expression and a student, and ask.");
    draw();
  }

  async function choose() {
    const { image, questions } = words.scenes[scene.value];
    expression.replaceChildren(...questions.map(({ expression: text }, i) => option(text, i)));
    const picture = part(".live-picture img");
    picture.src = image;
    await picture.decode();
    pixels = pixelsOf(picture);
    restart();
  }

  // A box is drawn with the mouse, a pen or a finger.
  let corner;
  const place = part(".live-picture");
  const at = (event) => {
    const { left, top, width, height } = place.getBoundingClientRect();
    return [(event.clientX - left) / width, (event.clientY - top) / height].map((v) => Math.min(1, Math.max(0, v)) * 1000);
  };
  place.addEventListener("pointerdown", (event) => {
    if (part("#live-own").hidden) return;
    corner = at(event);
    place.setPointerCapture(event.pointerId);
  });
  place.addEventListener("pointermove", (event) => {
    if (!corner) return;
    const other = at(event);
    const box = snap([0, 1].map((k) => Math.min(corner[k], other[k])).concat([0, 1].map((k) => Math.max(corner[k], other[k]))));
    sides.forEach((field, k) => (field.value = box[k]));
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) place.addEventListener(end, () => (corner = undefined));

  scene.addEventListener("change", choose);
  expression.addEventListener("change", restart);
  student.addEventListener("change", restart);
  truth.addEventListener("change", draw);
  sides.forEach((field) => field.addEventListener("input", draw));
  part("#live-ask").addEventListener("click", () => ask());
  part("#live-again").addEventListener("click", () => ask());
  part("#live-sample").addEventListener("click", sample);
  part("#live-show").addEventListener("click", () => ask(own()));
  part("#live-restart").addEventListener("click", restart);
  await choose();
})();
