// The trajectory explorer of docs/explore.md, over the samples that `make book` writes.
const { samples, methods, of } = window.IVT_EXPLORER;
const last = (sample) => sample.answers[method.value].at(-1).iou;
const change = (sample) => last(sample) - sample.answers[method.value][0].iou;
const ORDERS = {
  "as they come": () => 0,
  "most improved first": (a, b) => change(b) - change(a),
  "most degraded first": (a, b) => change(a) - change(b),
  "worst final step first": (a, b) => last(a) - last(b),
};

const root = document.getElementById("explorer");
const choices = (names) => names.map(([value, text]) => `<option value="${value}">${text}</option>`).join("");
root.innerHTML = `
  <div class="explorer-row">
    <label>Method <select id="ex-method">${choices(Object.entries(methods))}</select></label>
    <label>Order <select id="ex-order">${choices(Object.keys(ORDERS).map((name) => [name, name]))}</select></label>
  </div>
  <div class="explorer-row">
    <button type="button" id="ex-back" aria-label="previous sample">←</button>
    <span id="ex-place" aria-live="polite"></span>
    <button type="button" id="ex-on" aria-label="next sample">→</button>
    <label>Step <input type="range" id="ex-step" min="0" max="2" step="1" value="0"></label>
  </div>
  <p class="explorer-words" aria-live="polite"></p>
  <div class="explorer-picture"><img alt="A test image"><svg viewBox="0 0 1000 1000" aria-hidden="true"></svg></div>
  <p class="explorer-answer" aria-live="polite"></p>
  <ol class="explorer-steps" start="0"></ol>`;

const part = (name) => root.querySelector(name);
const [method, order, step] = ["#ex-method", "#ex-order", "#ex-step"].map(part);
method.value = "sft_ivt";
let place = 0;
let sorted = samples;

function box(corners, look) {
  const shape = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const [x1, y1, x2, y2] = corners;
  Object.entries({ x: x1, y: y1, width: x2 - x1, height: y2 - y1, class: look })
    .forEach(([name, value]) => shape.setAttribute(name, value));
  return shape;
}

function draw() {
  const sample = sorted[place];
  const answers = sample.answers[method.value];
  const now = answers[step.value];
  const told = (answer) => (answer.box ? `IoU ${answer.iou.toFixed(2)}` : "no box in the answer");
  part("#ex-place").textContent = `sample ${place + 1} of ${samples.length} (test set: ${of})`;
  part(".explorer-words").textContent = `“${sample.expression}”`;
  part("img").src = sample.image;
  part("img").alt = `Test image for “${sample.expression}”. ${methods[method.value]}, step ${step.value}: ` +
    (now.box ? `the answer ${JSON.stringify(now.box)} has ${told(now)} with the truth` : told(now)) +
    `; the true box is ${JSON.stringify(sample.truth)}.`;
  part("svg").replaceChildren(...(now.box ? [box(now.box, "answer")] : []), box(sample.truth, "truth"));
  part(".explorer-answer").textContent = `Step ${step.value}, ${told(now)}: ${now.text}`;
  step.setAttribute("aria-valuetext", `step ${step.value}, ${told(now)}`);
  part(".explorer-steps").replaceChildren(...answers.map((answer, t) => {
    const line = document.createElement("li");
    line.textContent = told(answer);
    line.style.setProperty("--share", answer.iou);
    line.classList.toggle("now", t === Number(step.value));
    line.toggleAttribute("aria-current", t === Number(step.value));
    return line;
  }));
}

function sort() {
  sorted = [...samples].sort(ORDERS[order.value]);
  go(0);
}

function go(to) {
  place = (to + samples.length) % samples.length;
  draw();
}

method.addEventListener("change", sort);
order.addEventListener("change", sort);
step.addEventListener("input", draw);
part("#ex-back").addEventListener("click", () => go(place - 1));
part("#ex-on").addEventListener("click", () => go(place + 1));
sort();
