// Scenes of shapes, and what an expression means in one: `ivt_utils/micro/scenes.py` for a page. Its words and numbers
// come from live.json, and the tests hold its pictures and meanings against Python's.
const IVT_SCENES = (() => {
  let known; // "drawing" of live.json

  // ---------------------------------------------------------------------------------------------- drawing
  // The pixels (RGBA) of a scene {things, background}, `size` wide and high, as `draw_scene`.
  function draw(scene, size) {
    const wide = 2 * size;
    const canvas = Object.assign(document.createElement("canvas"), { width: wide, height: wide });
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    drawBackground(pen, wide, scene.background);
    for (const thing of scene.things) drawThing(pen, thing, wide);
    const fine = pen.getImageData(0, 0, wide, wide).data;
    const pixels = new Uint8ClampedArray(4 * size * size);
    for (let y = 0; y < size; y++) {
      for (let x = 0; x < size; x++) {
        for (let c = 0; c < 4; c++) {
          const at = 4 * (2 * y * wide + 2 * x) + c;
          pixels[4 * (y * size + x) + c] = (fine[at] + fine[at + 4] + fine[at + 4 * wide] + fine[at + 4 * wide + 4]) / 4;
        }
      }
    }
    return pixels;
  }

  const rgb = (color) => `rgb(${color.join(" ")})`;

  function drawThing(pen, { shape, box, tint }, wide) {
    const [left, top, right, bottom] = box.map((v) => (v * wide) / 1000); // Pillow takes them for whole pixels
    const line = Math.max(2, Math.round((right - left) * known.edge));
    pen.fillStyle = rgb(tint);
    pen.strokeStyle = rgb(tint.map((c) => Math.trunc(c * known.edge_shade)));
    pen.lineWidth = line;
    pen.lineJoin = "round";
    pen.beginPath();
    if (shape === "circle") { // its edge lies inside
      const [x, y] = [Math.trunc(left), Math.trunc(top)];
      const [across, down] = [Math.trunc(right) + 1 - x, Math.trunc(bottom) + 1 - y].map((length) => length / 2);
      pen.ellipse(x + across, y + down, across - line / 2, down - line / 2, 0, 0, 2 * Math.PI);
    } else {
      for (const [u, v] of known.outlines[shape]) {
        pen.lineTo(Math.trunc(left + u * (right - left)) + 0.5, Math.trunc(top + v * (bottom - top)) + 0.5);
      }
      pen.closePath();
    }
    pen.fill();
    pen.stroke();
  }

  function drawBackground(pen, wide, [kind, first, second]) {
    const step = Math.floor(wide / 12);
    pen.fillStyle = rgb(first);
    pen.fillRect(0, 0, wide, wide);
    pen.fillStyle = pen.strokeStyle = rgb(second);
    if (kind === "gradient") {
      for (let y = 0; y < wide; y += 4) {
        pen.fillStyle = rgb(first.map((c, k) => Math.trunc(c * (1 - y / wide) + (second[k] * y) / wide)));
        pen.fillRect(0, y, wide, 4);
      }
    } else if (kind === "stripes") {
      pen.lineWidth = Math.floor(step / 2);
      pen.lineCap = "butt";
      for (let x = -wide; x < wide; x += 2 * step) {
        pen.beginPath();
        pen.moveTo(x, 0);
        pen.lineTo(x + wide, wide);
        pen.stroke();
      }
    } else if (kind === "checks" || kind === "dots") {
      for (let i = 0; i < 12; i++) {
        for (let j = 0; j < 12; j++) {
          if (kind === "dots") {
            pen.beginPath();
            pen.arc((i + 0.5) * step + 0.5, (j + 0.5) * step + 0.5, step * 0.16 + 0.5, 0, 2 * Math.PI);
            pen.fill();
          } else if ((i + j) % 2 === 0) pen.fillRect(i * step, j * step, step, step);
        }
      }
    }
  }

  // ---------------------------------------------------------------------------------------------- meaning
  const center = ({ box }) => [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2];
  const side = ({ box }) => box[2] - box[0];
  // Of four directions in the order of the words: how far something reaches into each.
  const along = (dx, dy) => [-dx, dx, -dy, dy];

  // The numbers of the things that a form fits, spatial words holding beyond a margin, as `referents`.
  function referents(things, form, margin) {
    let fit = things.map((_, i) => i).filter((i) => hasAttributes(things[i], form));
    if (form.relation && fit.length) {
      const anchors = things.map((_, i) => i).filter((i) => hasAttributes(things[i], form.landmark));
      if (anchors.length !== 1) return [];
      const [x, y] = center(things[anchors[0]]);
      fit = fit.filter((i) => {
        const [u, v] = center(things[i]);
        return i !== anchors[0] && along(u - x, v - y)[known.relations.indexOf(form.relation)] > margin;
      });
    }
    if (form.place) {
      fit = fit.filter((i) => {
        const [u, v] = center(things[i]);
        return along(u - 500, v - 500)[known.halves.indexOf(form.place)] > margin;
      });
    }
    if (form.superlative && fit.length) fit = extreme(things, fit, form.superlative, margin);
    if (form.ordinal && fit.length) fit = second(things, fit, form.ordinal, margin);
    return fit;
  }

  function hasAttributes(thing, { shape, color, size, notColor, notShape }) {
    return (!shape || shape === thing.shape) && (!color || color === thing.color) && (!size || size === thing.size) &&
      notColor !== thing.color && notShape !== thing.shape;
  }

  function extreme(things, fit, superlative, margin) {
    const score = (i) => {
      const [x, y] = center(things[i]);
      return [...along(x, y), side(things[i]), -side(things[i])][known.superlatives.indexOf(superlative)];
    };
    const ranked = [...fit].sort((a, b) => score(b) - score(a));
    if (ranked.length < 2) return [];
    return margin === known.strict && score(ranked[0]) - score(ranked[1]) < known.strict / 2 ? [] : ranked.slice(0, 1);
  }

  function second(things, fit, from, margin) {
    const x = (i) => center(things[i])[0];
    const ranked = [...fit].sort((a, b) => (from === "right" ? x(b) - x(a) : x(a) - x(b)));
    if (ranked.length < 3) return [];
    const gaps = [0, 1].map((k) => Math.abs(x(ranked[k]) - x(ranked[k + 1])));
    return margin === known.strict && Math.min(...gaps) < known.strict / 2 ? [] : ranked.slice(1, 2);
  }

  // ---------------------------------------------------------------------------------------------- words
  // What the menus say of a form, one word group each, "" where it says nothing; joined, it is the form's English.
  function groups(form) {
    const which = form.superlative ?? (form.ordinal ? `second from the ${form.ordinal}` : "");
    const not = form.notColor ? `that is not ${form.notColor}` : form.notShape ? `that is not a ${form.notShape}` : "";
    const beside = form.relation ? `${form.relation} the ${form.landmark.color} ${form.landmark.shape}` : "";
    return [which, form.size ?? "", form.color ?? "", form.shape ?? "object", not || (form.place ?? ""), beside];
  }

  // The English of a form, as `to_text`.
  function text(form) {
    const [which, size, color, shape, rest, beside] = groups(form);
    const [most, from] = form.ordinal ? ["second", `from the ${form.ordinal}`] : [which, ""];
    const joined = [rest, beside].filter(Boolean).join(form.place && beside ? " and " : " ");
    return ["the", most, size, color, shape, from, joined].filter(Boolean).join(" ");
  }

  const both = (first, then) => first.flatMap((a) => then.map((b) => ({ ...a, ...b })));

  // Every expression of these words and forms that means one thing of the scene, and only one, at both margins:
  // [{text, groups, target}]. The forms are those of `_propose`, with one landmark at most, and their mixtures.
  function expressions({ things }) {
    const kinds = (name, key = name) => [...new Set(things.map((thing) => thing[key]))].map((value) => ({ [name]: value }));
    const [colors, shapes] = [[{}, ...kinds("color")], [{}, ...kinds("shape")]];
    const sizes = [{}, ...kinds("size").filter(({ size }) => size !== "medium")]; // nobody says "the medium circle"
    const most = known.superlatives.map((superlative) => ({ superlative }));
    const ordinals = ["left", "right"].map((ordinal) => ({ ordinal }));
    const places = [{}, ...known.halves.map((place) => ({ place }))];
    const landmarks = both(kinds("color"), kinds("shape")).filter((landmark) => referents(things, landmark, 0).length === 1);
    const beside = [{}, ...known.relations.flatMap((relation) => landmarks.map((landmark) => ({ relation, landmark })))];
    const forms = [
      ...both(both(both(both(sizes, colors), shapes), places), beside),
      ...both(both([...most, ...ordinals], colors), shapes),
      ...both(both(sizes, shapes), kinds("notColor", "color")),
      ...both(colors, kinds("notShape", "shape")),
    ];
    return forms.flatMap((form) => {
      const [target, other] = referents(things, form, known.lenient);
      const strict = referents(things, form, known.strict);
      const unique = target !== undefined && other === undefined && strict.length === 1 && strict[0] === target;
      return unique ? [{ text: text(form), groups: groups(form), target }] : [];
    });
  }

  // ---------------------------------------------------------------------------------------------- changes
  // The overlap of two things, as a share of the smaller one.
  function covered({ box: a }, { box: b }) {
    const [wide, high] = [0, 1].map((k) => Math.max(0, Math.min(a[k + 2], b[k + 2]) - Math.max(a[k], b[k])));
    return (wide * high) / Math.min(...[a, b].map((box) => (box[2] - box[0]) * (box[3] - box[1])));
  }

  // Whether a thing hides another one, or is hidden, more than in any scene of the course.
  const crowded = ({ things }) =>
    things.some((thing, i) => things.slice(i + 1).some((other) => covered(thing, other) >= known.most_covered));

  // A thing as it is with a color, a shape, a size or a center [x, y] (0..1000) that is new; it stays in the image.
  function changed(thing, news) {
    const wide = news.size ? known.sides[news.size] : side(thing);
    const corner = (news.center ?? center(thing)).map((v) => Math.min(Math.floor(1000 - wide), Math.max(0, Math.round(v - wide / 2))));
    const tint = news.color ? known.colors[news.color] : thing.tint;
    const { center: _, ...words } = news;
    return { ...thing, ...words, tint, box: [...corner, ...corner.map((v) => v + wide)] };
  }

  // A thing that stands beside all others, or undefined where there is no room for it.
  function added({ things }) {
    const look = { shape: known.shapes[0], color: Object.keys(known.colors)[0], size: Object.keys(known.sides)[0] };
    for (let y = 100; y < 1000; y += 50) {
      for (let x = 100; x < 1000; x += 50) {
        const thing = changed({ box: [0, 0, 0, 0] }, { ...look, center: [x, y] });
        if (things.every((other) => !covered(thing, other))) return thing;
      }
    }
  }

  return { open: (words) => (known = words.drawing), draw, expressions, crowded, changed, added, center };
})();
