// A picture on which a box is drawn by mouse, finger, pen or keyboard. Boxes are [x1, y1, x2, y2], 0..1000.
// Shared with Python: image, label, box, truth, grid, busy, status; `submits` counts how often a box was submitted.
const SIDE = 400; // CSS pixels of the longer side, where there is room
const FIRST = [350, 350, 650, 650]; // what the keyboard starts with
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const KEYS = "Drag a box with the mouse or a finger. Keys: arrows move it, Shift and arrows resize it, Enter submits it.";
let count = 0;

const between = (low, value, high) => Math.min(high, Math.max(low, value));

function moved(box, [dx, dy], resize, step) {
  // The box after an arrow key; it stays in the picture, at least one step wide and high.
  const [x1, y1, x2, y2] = box;
  if (resize)
    return [x1, y1, between(x1 + step, x2 + dx * step, 1000), between(y1 + step, y2 + dy * step, 1000)];
  const x = between(-x1, dx * step, 1000 - x2), y = between(-y1, dy * step, 1000 - y2);
  return [x1 + x, y1 + y, x2 + x, y2 + y];
}

function make(tag, parent, attributes, text = "") {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

function render({ model, el }) {
  const root = make("div", el, { class: "ivt-canvas" });
  const help = `ivt-canvas-help-${count++}`;
  const canvas = make("canvas", root, { tabindex: "0", role: "application", "aria-describedby": help });
  make("p", root, { id: help, class: "ivt-canvas-help" }, KEYS);
  const submit = make("button", root, { type: "button", class: "ivt-canvas-submit" }, "Submit box");
  const status = make("p", root, { role: "status", "aria-live": "polite", class: "ivt-canvas-status" });
  const picture = new Image();
  let start = null, before = [];

  const box = () => model.get("box");
  const step = () => model.get("grid") * Math.max(1, Math.round(10 / model.get("grid")));
  const say = (text) => { status.textContent = text; };
  const told = () => (box().length ? `Your box: ${box().join(", ")} (0 to 1000).` : "No box yet.");

  function draw() {
    const wide = picture.naturalWidth || 1, high = picture.naturalHeight || 1;
    const room = Math.min(SIDE, root.clientWidth || SIDE), scale = room / Math.max(wide, high);
    const [width, height] = [Math.round(wide * scale), Math.round(high * scale)];
    const ratio = window.devicePixelRatio || 1;
    [canvas.width, canvas.height] = [width * ratio, height * ratio];
    canvas.style.width = `${width}px`;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    if (picture.naturalWidth) pen.drawImage(picture, 0, 0, width, height);
    const outline = (coordinates, color, dashes) => {
      if (!coordinates.length) return;
      const [x1, y1, x2, y2] = coordinates.map((v, i) => (v * (i % 2 ? height : width)) / 1000);
      for (const [ink, thick, dash] of [["#ffffff", 5, []], [color, 3, dashes]]) { // white below: seen on any picture
        [pen.strokeStyle, pen.lineWidth] = [ink, thick];
        pen.setLineDash(dash);
        pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
      }
    };
    outline(model.get("truth"), model.get("truth_color"), [8, 5]);
    outline(box(), model.get("box_color"), []);
    submit.disabled = !box().length || model.get("busy");
    canvas.setAttribute("aria-label", `Picture for “${model.get("label")}”. ${told()}`);
  }

  function set(value) {
    model.set("status", ""); // what was said of another box
    model.set("box", value);
    model.save_changes();
  }

  function send() {
    if (submit.disabled) return;
    say("The student looks at your box ...");
    model.set("submits", model.get("submits") + 1);
    model.set("busy", true);
    model.save_changes();
  }

  function place(event) {
    const area = canvas.getBoundingClientRect(), grid = model.get("grid");
    const at = [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
    return at.map((share) => between(0, Math.round((share * 1000) / grid) * grid, 1000));
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button || model.get("busy")) return;
    canvas.setPointerCapture(event.pointerId);
    [start, before] = [place(event), box()];
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!start) return;
    const [x, y] = place(event), least = 2 * model.get("grid");
    const drawn = [Math.min(x, start[0]), Math.min(y, start[1]), Math.max(x, start[0]), Math.max(y, start[1])];
    const large = drawn[2] - drawn[0] >= Math.min(20, least) && drawn[3] - drawn[1] >= Math.min(20, least);
    set(large ? drawn : before); // a click is no box
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { start = null; });
  root.addEventListener("keydown", (event) => {
    event.stopPropagation(); // else a notebook takes Enter and the arrows
    if (event.target !== canvas || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter") send();
    else if (ARROWS[event.key]) {
      if (!model.get("busy")) set(box().length ? moved(box(), ARROWS[event.key], event.shiftKey, step()) : FIRST);
    } else return;
    event.preventDefault();
  });
  submit.addEventListener("click", send);

  const load = () => { picture.src = model.get("image"); };
  picture.addEventListener("load", draw);
  const show = () => {
    say(model.get("status") || told());
    draw();
  };
  const watched = { "change:image": load };
  for (const name of ["box", "truth", "label", "status"]) watched[`change:${name}`] = show;
  watched["change:busy"] = draw;
  for (const [name, react] of Object.entries(watched)) model.on(name, react);
  const size = new ResizeObserver(() => requestAnimationFrame(draw)); // later: drawing changes the height
  size.observe(root);
  show();
  load();
  return () => { // the view goes
    size.disconnect();
    for (const [name, react] of Object.entries(watched)) model.off(name, react);
  };
}

export default { render };
