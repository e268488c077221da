// The students of docs/live.md in a browser: what `ivt build live` writes, and the loop around it. Nothing here knows how
// a box is drawn, a picture is prepared or a token is placed: the networks do, and the words come from live.json.
const IVT_LIVE = (() => {
  const RUNTIME = "ort.wasm.min.js";
  const EYES = "eyes.onnx";
  const WORDS = "live.json";
  let folder, words;
  const networks = {};

  async function bytes(name) {
    const answer = await fetch(folder + name).catch(() => ({ ok: false }));
    if (!answer.ok) throw new Error(`The file ${name} is missing: \`ivt build live\` makes it, before \`make book\`.`);
    return answer;
  }

  const damaged = (name) => new Error(`The file ${name} was cut off on its way, or is damaged: reload the page, or run ` +
    "`ivt build live` again.");

  async function open(where) {
    if (location.protocol === "file:") {
      throw new Error("A page that was opened as a file may not load a model: in the folder of the book, say " +
        "`python -m http.server`, and open http://localhost:8000/docs/live.html.");
    }
    folder = where;
    words = await (await bytes(WORDS)).json().catch(() => null);
    if (!words?.checksums) throw damaged(WORDS);
    words.pattern = new RegExp(words.pattern, "gu");
    words.id = new Map(words.tokens.map((token, id) => [token, id]));
    const escaped = words.whole.map((token) => token.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    words.split = new RegExp(`(${escaped.join("|")})`, "u");
    return words;
  }

  const whole = () => [0, 0, 1000, 1000];

  // A network, loaded once; after a failure it is tried again.
  function network(name) {
    networks[name] ??= load(name).catch((trouble) => {
      delete networks[name];
      throw trouble;
    });
    return networks[name];
  }

  async function load(name) {
    if (!window.ort) {
      await bytes(RUNTIME);
      await new Promise((done, failed) => {
        const script = document.createElement("script");
        Object.assign(script, { src: folder + RUNTIME, onload: done, onerror: failed });
        document.head.append(script);
      }).catch(() => {});
      if (!window.ort) throw damaged(RUNTIME);
      ort.env.wasm.numThreads = 1; // more would need special headers from the server
      ort.env.wasm.wasmPaths = folder;
    }
    const answer = await bytes(name);
    try {
      return await ort.InferenceSession.create(new Uint8Array(await answer.arrayBuffer()), { executionProviders: ["wasm"] });
    } catch {
      throw damaged(`${name}, or the runtime beside it,`); // a runtime that failed is not asked for again by itself
    }
  }

  // How many MB the next answer of a student has to load first.
  function toLoad(name) {
    const files = [window.ort ? [] : words.runtime, [EYES, `${name}.onnx`].filter((file) => !networks[file])].flat();
    return files.reduce((size, file) => size + words.bytes[file], 0) / 1e6;
  }

  // What the student's tokenizer makes of a text.
  function encode(text) {
    const pieces = text.split(words.split).flatMap((part, i) => (i % 2 ? [part] : part.match(words.pattern) ?? []));
    return pieces.map((piece) => words.id.get(piece) ?? words.unknown);
  }

  function decode(ids) {
    return ids.filter((id) => !words.silent.includes(id)).map((id) => words.tokens[id]).join("");
  }

  // The one committed box of an answer, or null, as `boxes.parse_answer` finds it in what the student can say.
  function parse(text) {
    if (text.split("{").length !== 2) return null;
    const whole = text.match(/\{"bbox_2d": \[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]\}/);
    if (!whole || whole.slice(1).some((number) => number !== String(Number(number)))) return null;
    const box = whole.slice(1).map(Number);
    return box.every((v) => v <= 1000) && box[0] < box[2] && box[1] < box[3] ? box : null;
  }

  function iou(a, b) {
    if (!a || !b) return 0;
    const side = (k) => Math.max(0, Math.min(a[k + 2], b[k + 2]) - Math.max(a[k], b[k]));
    const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
    const overlap = side(0) * side(1);
    return overlap / (area(a) + area(b) - overlap);
  }

  // Four numbers as a box on a grid, by default the student's, as `boxes.snap`.
  function snap(box, grid = words.grid) {
    const [x1, y1, x2, y2] = box.map((v) => Math.min(1000, Math.max(0, grid * Math.floor(v / grid + 0.5))));
    const [left, top] = [Math.min(x1, 1000 - grid), Math.min(y1, 1000 - grid)];
    return [left, top, Math.max(x2, left + grid), Math.max(y2, top + grid)];
  }

  // The part of the image that a closer look around a box shows, as `boxes.view`; and a box in it as one of the image.
  function view(box) {
    if (!box) return whole();
    const side = Math.min(1000, Math.max(words.least_view, Math.round(words.zoom * Math.max(box[2] - box[0], box[3] - box[1]))));
    const [x, y] = [0, 1].map((k) => Math.min(Math.max(0, Math.floor((box[k] + box[k + 2] - side) / 2)), 1000 - side));
    return [x, y, x + side, y + side];
  }

  function fromView(box, part) {
    return snap(box.map((v, k) => part[k % 2] + (v * (part[k % 2 + 2] - part[k % 2])) / 1000), 1);
  }

  // The pixels (RGBA) of an <img> that is loaded.
  function pixelsOf(image) {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: words.width, height: words.height });
    const drawn = canvas.getContext("2d", { willReadFrequently: true });
    drawn.drawImage(image, 0, 0);
    return drawn.getImageData(0, 0, words.width, words.height).data;
  }

  // Of a scene's pixels: what is shown of them, with a box drawn on it where there is one, and what the student sees.
  async function see(pixels, box, part = whole()) {
    const given = await (await network(EYES)).run({
      picture: new ort.Tensor("uint8", new Uint8Array(pixels), [words.height, words.width, 4]),
      box: new ort.Tensor("int32", box ?? [0, 0, 0, 0], [4]),
      part: new ort.Tensor("int32", part, [4]),
    });
    return { shown: new Uint8ClampedArray(given.shown.data), features: given.features.data };
  }

  function chat(turns) {
    return turns.map(({ said, text }) => words.open + said + words.ask + (text === undefined ? "" : text + words.done))
      .join("");
  }

  // The next token: the likeliest, or one drawn at a temperature above 0.
  function chosen(logits, temperature) {
    const most = Math.max(...logits);
    if (!temperature) return logits.indexOf(most);
    const weights = Array.from(logits, (v) => Math.exp((v - most) / temperature));
    let left = Math.random() * weights.reduce((a, b) => a + b);
    return Math.max(0, weights.findIndex((weight) => (left -= weight) < 0));
  }

  // The next answer to a chat of turns {said, features, text}, of which the last has no text yet.
  async function answer(name, turns, temperature = 0) {
    const reader = await network(`${name}.onnx`);
    const seen = turns.flatMap(({ features }) => [...features]);
    const features = new ort.Tensor("float32", Float32Array.from(seen), [seen.length / words.features, words.features]);
    let tokens = encode(chat(turns));
    let place = new ort.Tensor("int32", [0], [1]);
    let past = new ort.Tensor("float32", [], words.past);
    const said = [];
    while (said.length < words.max_new_tokens) {
      const given = await reader.run({
        tokens: new ort.Tensor("int32", tokens, [tokens.length]), features, place, past,
      });
      const next = chosen(given.logits.data, temperature);
      if (next === words.end) break;
      said.push(next);
      [tokens, place, past] = [[next], given.next_place, given.next_past];
    }
    return decode(said);
  }

  // What a student has of the steps before a question: a closer look asks the first question afresh.
  const before = (name, steps) => (name === words.closer ? [] : steps);

  // One step of the loop: `steps` so far, each {shown, features, said, text, box, fed, part}, and the new one. `fed`: the
  // box that is drawn on the picture, or looked at closer; by default the last answer's. `part`: what is seen of the image.
  async function step(name, pixels, expression, steps, fed = steps.at(-1)?.box ?? null) {
    const closer = name === words.closer;
    const said = !steps.length || closer ? words.prompt.join(expression) : fed ? words.feedback : words.no_box;
    const part = closer ? view(fed) : whole();
    const seen = await see(pixels, closer ? null : fed, part);
    const text = await answer(name, [...before(name, steps), { said, features: seen.features }]);
    return { ...seen, said, text, box: read(text, part), fed, part };
  }

  // The box of an answer about a part of the image, as one of the image.
  function read(text, part) {
    const box = parse(text);
    return box && fromView(box, part);
  }

  // A group of sampled answers to the last question of a chat: [{text, box}].
  async function group(name, steps) {
    const { said, features, part } = steps.at(-1);
    const made = [];
    while (made.length < words.generations) {
      const text = await answer(name, [...before(name, steps.slice(0, -1)), { said, features }], words.temperature);
      made.push({ text, box: read(text, part) });
    }
    return made;
  }

  // The reward and the advantage of each answer of a group, as `grpo.group_rewards` and `grpo.advantages` ("group").
  function rewarded(answers, truth) {
    const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
    const rewards = answers.map(({ box }) => (box ? iou(box, truth) + words.format_bonus : 0));
    const middle = mean(rewards);
    const squares = rewards.map((reward) => (reward - middle) ** 2);
    const spread = Math.sqrt((mean(squares) * rewards.length) / (rewards.length - 1));
    return rewards.map((reward) => ({ reward, advantage: (reward - middle) / (spread + 1e-4) }));
  }

  return { open, toLoad, encode, decode, chat, parse, iou, snap, view, read, pixelsOf, see, step, group, rewarded };
})();
