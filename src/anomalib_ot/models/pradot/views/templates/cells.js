"use strict";
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const types = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array };
  const unpack = ({ type, values }) => new types[type](Uint8Array.from(atob(values), (it) => it.charCodeAt(0)).buffer);
  const images = [...document.querySelectorAll("#pictures img")];
  const [width, height] = data.size;
  // RGBA of each share of the scale: as they are, and clear where nothing costs anything, to lay over an image.
  const colours = { map: new Uint8ClampedArray(1024), overlay: new Uint8ClampedArray(1024) };
  unpack(data.colours).forEach((value, index) => {
    const [share, channel] = [Math.floor(index / 3), index % 3];
    for (const [name, table] of Object.entries(colours)) {
      table[4 * share + channel] = value;
      table[4 * share + 3] = name === "map" ? 255 : share;
    }
  });
  const state = { picture: 0, layer: 0, set: 0, weight: 0, row: 0, column: 0 };

  for (const layer of data.layers) {
    for (const set of layer.sets) {
      for (const part of ["numbers", "coordinates", "winners", "features", "spaces", "pictures", "cells"]) {
        if (part in set) {
          set[part] = { unit: set[part].unit, values: unpack(set[part]) };
        }
      }
      if ("sheet" in set) {
        set.image = new Image();
        set.image.src = set.sheet;
      }
    }
  }

  const layer = () => data.layers[state.layer];
  const set = () => layer().sets[state.set];
  const alpha = () => data.weights[state.weight];

  /** What a cell, counted row by row, costs with a weight: the winning prototype and the two parts. */
  const costOf = (cell, weight = state.weight) => {
    const { rows, columns } = layer();
    const { winners, features, spaces } = set();
    const index = (weight * images.length + state.picture) * rows * columns + cell;
    const feature = features.values[index] * features.unit;
    const space = spaces.values[index] * spaces.unit;
    const look = (1 - data.weights[weight]) * feature;
    const place = data.weights[weight] * space;
    return { prototype: winners.values[index], feature, space, look, place, cost: look + place };
  };

  const costs = () => Float32Array.from({ length: layer().rows * layer().columns }, (_, cell) => costOf(cell).cost);

  /** Place of a prototype in cells; whole numbers are centres of cells. */
  const placeOf = (prototype) => {
    const { values, unit } = set().coordinates;
    const { rows, columns } = layer();
    return [values[2 * prototype] * unit * (rows - 1), values[2 * prototype + 1] * unit * (columns - 1)];
  };

  /** For each pixel along a side, the two cells that it lies between and how near it is to the second. */
  const between = (cells, pixels) =>
    Array.from({ length: pixels }, (_, pixel) => {
      const position = Math.min(Math.max(((pixel + 0.5) * cells) / pixels - 0.5, 0), cells - 1);
      const first = Math.floor(position);
      return [first, Math.min(first + 1, cells - 1), position - first];
    });

  /** The costs as an image: bilinear between cells, in the colours of the scale. */
  const colouredMap = (values, table) => {
    const { rows, columns, highest } = layer();
    const whole = new Uint32Array(table.buffer);
    const map = new OffscreenCanvas(width, height);
    const context = map.getContext("2d");
    const pixels = context.createImageData(width, height);
    const painted = new Uint32Array(pixels.data.buffer);
    const across = between(columns, width);
    between(rows, height).forEach(([above, below, down], y) => {
      across.forEach(([left, right, over], x) => {
        const upper = values[above * columns + left] * (1 - over) + values[above * columns + right] * over;
        const lower = values[below * columns + left] * (1 - over) + values[below * columns + right] * over;
        const share = Math.min((upper * (1 - down) + lower * down) / (highest || 1), 1);
        painted[y * width + x] = whole[Math.round(share * 255)];
      });
    });
    context.putImageData(pixels, 0, 0);
    return map;
  };

  const drawGrid = (context, canvas) => {
    const { rows, columns } = layer();
    context.beginPath();
    for (let row = 1; row < rows; row += 1) {
      const y = Math.round((row / rows) * canvas.height) + 0.5;
      context.moveTo(0, y);
      context.lineTo(canvas.width, y);
    }
    for (let column = 1; column < columns; column += 1) {
      const x = Math.round((column / columns) * canvas.width) + 0.5;
      context.moveTo(x, 0);
      context.lineTo(x, canvas.height);
    }
    context.lineWidth = 1;
    context.strokeStyle = "rgb(255 255 255 / 18%)";
    context.stroke();
  };

  /** A line in a colour, with a dark one below it, seen on any ground. */
  const stroke = (context, path, colour, thick) => {
    context.lineJoin = "round";
    context.lineCap = "round";
    for (const [style, lineWidth] of [["rgb(0 0 0 / 80%)", 2.4 * thick], [colour, thick]]) {
      context.strokeStyle = style;
      context.lineWidth = lineWidth;
      context.stroke(path);
    }
  };

  /** The cell, its prototype's place, and an arrow between them. */
  const drawFocus = (context, canvas, prototype) => {
    const { rows, columns } = layer();
    const cell = [canvas.width / columns, canvas.height / rows];
    const thick = 1.8 * devicePixelRatio;
    const style = getComputedStyle(document.documentElement);
    const square = new Path2D();
    square.rect(state.column * cell[0], state.row * cell[1], ...cell);
    const [row, column] = placeOf(prototype);
    const [x, y] = [(column + 0.5) * cell[0], (row + 0.5) * cell[1]];
    const radius = Math.min(...cell) * 0.4 + thick;
    const ring = new Path2D();
    ring.arc(x, y, radius, 0, 2 * Math.PI);
    const start = [(state.column + 0.5) * cell[0], (state.row + 0.5) * cell[1]];
    const angle = Math.atan2(y - start[1], x - start[0]);
    const tip = [x - Math.cos(angle) * (radius + thick), y - Math.sin(angle) * (radius + thick)];
    stroke(context, square, style.getPropertyValue("--cell"), thick);
    stroke(context, ring, style.getPropertyValue("--prototype"), thick);
    if (Math.hypot(x - start[0], y - start[1]) > 2 * radius) {
      const arrow = new Path2D();
      const head = 5 * thick;
      arrow.moveTo(...start);
      arrow.lineTo(...tip);
      arrow.moveTo(tip[0] - head * Math.cos(angle - 0.5), tip[1] - head * Math.sin(angle - 0.5));
      arrow.lineTo(...tip);
      arrow.lineTo(tip[0] - head * Math.cos(angle + 0.5), tip[1] - head * Math.sin(angle + 0.5));
      stroke(context, arrow, "white", thick);
    }
  };

  const drawViews = (values, prototype) => {
    const overlay = [colouredMap(values, colours.overlay), at("opacity").value / 100];
    const layers = { picture: [[images[state.picture], 1], overlay], map: [[colouredMap(values, colours.map), 1]] };
    for (const [id, parts] of Object.entries(layers)) {
      const canvas = at(id);
      const context = canvas.getContext("2d");
      for (const [part, opacity] of parts) {
        context.globalAlpha = opacity;
        context.drawImage(part, 0, 0, canvas.width, canvas.height);
      }
      context.globalAlpha = 1;
      if (id === "picture") {
        drawGrid(context, canvas);
      }
      drawFocus(context, canvas, prototype);
    }
  };

  const drawPatch = (id, image, box) => {
    const canvas = at(id);
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (image) {
      context.drawImage(image, ...box, 0, 0, canvas.width, canvas.height);
    }
  };

  const drawPatches = (prototype) => {
    const { rows, columns } = layer();
    const side = [width / columns, height / rows];
    drawPatch("cell-patch", images[state.picture], [state.column * side[0], state.row * side[1], ...side]);
    const { image, across, patch } = set();
    at("prototype-patch").hidden = !image;
    if (image) {
      drawPatch("prototype-patch", image, [
        (prototype % across) * patch[0],
        Math.floor(prototype / across) * patch[1],
        ...patch,
      ]);
    }
  };

  const write = (texts) => Object.entries(texts).forEach(([id, text]) => { at(id).textContent = text; });
  const short = (value) => value.toFixed(3);

  /** Both parts of the cell's cost over α, one on the other. */
  const drawCourse = (cell) => {
    const course = data.weights.map((_, weight) => costOf(cell, weight));
    const top = Math.max(...course.map((it) => it.cost)) || 1;
    const area = (part) => {
      const points = course.map((it, weight) => `${280 * data.weights[weight]} ${66 - (60 * it[part]) / top}`);
      return `M0 66L${points.join("L")}L280 66Z`;
    };
    write({ top: `at most ${short(top)}` });
    const svg = document.querySelector("#course svg");
    svg.querySelector(".place").setAttribute("d", area("cost"));
    svg.querySelector(".look").setAttribute("d", area("look"));
    svg.querySelector(".now").setAttribute("d", `M${280 * alpha()} 2V66`);
  };

  // Counted from 1; a place between cells keeps a digit.
  const counted = (value) => String(Math.round(10 * (value + 1)) / 10);
  const position = (row, column) => `row ${counted(row)}, column ${counted(column)}`;

  const writeDetails = (values, it) => {
    const { numbers, count, names, pictures, cells } = set();
    const rank = 1 + values.filter((value) => value > values[state.row * layer().columns + state.column]).length;
    const place = position(...placeOf(it.prototype));
    const here = position(state.row, state.column);
    const number = `no. ${numbers.values[it.prototype] + 1} of ${count}`;
    const source = [];
    if (names) {
      const cell = cells.values[it.prototype];
      const { columns } = layer();
      source.push(`as in ${names[pictures.values[it.prototype]]}`, position(Math.floor(cell / columns), cell % columns));
    }
    write({
      "cell-place": here,
      "prototype-place": [place, number, ...source].join("\n"),
      "cost": short(it.cost),
      "rank": `rank ${rank} of ${values.length}`,
      "look": short(it.look),
      "look-sum": `(1 − α) · ${short(it.feature)}`,
      "place": short(it.place),
      "place-sum": `α · ${short(it.space)}`,
      "sentence": `The cell at ${here} costs ${short(it.cost)}, rank ${rank} of ${values.length}: look ` +
        `${short(it.look)}, place ${short(it.place)}. Its prototype is ${[number, `at ${place}`, ...source].join(", ")}.`,
    });
  };

  const update = () => {
    const values = costs();
    const cell = state.row * layer().columns + state.column;
    const it = costOf(cell);
    const learned = set().alpha === alpha() ? " (learned)" : "";
    write({
      "weight-value": `${Number(alpha().toFixed(3))}${learned}`,
      "opacity-value": `${at("opacity").value} %`,
      "highest": short(layer().highest),
    });
    at("weight").setAttribute("aria-valuetext", `α = ${at("weight-value").textContent}`);
    drawViews(values, it.prototype);
    drawPatches(it.prototype);
    drawCourse(cell);
    writeDetails(values, it);
  };

  let waiting = false;
  /** Draws once for all that happens before the next frame. */
  const change = (changes) => {
    Object.assign(state, changes);
    if (!waiting) {
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        update();
      });
    }
  };

  const moveTo = (row, column) => {
    const { rows, columns } = layer();
    change({
      row: Math.min(Math.max(row, 0), rows - 1),
      column: Math.min(Math.max(column, 0), columns - 1),
    });
  };

  const goToCostliest = () => {
    const values = costs();
    const cell = values.indexOf(Math.max(...values));
    moveTo(Math.floor(cell / layer().columns), cell % layer().columns);
  };

  const learnedWeight = () => data.weights.indexOf(set().alpha);

  const point = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const { rows, columns } = layer();
    moveTo(
      Math.floor(((event.clientY - box.top) / box.height) * rows),
      Math.floor(((event.clientX - box.left) / box.width) * columns),
    );
  };

  const press = (event) => {
    const { row, column } = state;
    const steps = {
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      Home: [row, 0],
      End: [row, layer().columns - 1],
    };
    if (event.key in steps && !event.altKey && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      moveTo(...steps[event.key]);
    }
  };

  /** As many pixels as the screen has for a view, so that lines are sharp. */
  const fit = (entries) => {
    for (const { target, contentRect } of entries) {
      target.width = Math.max(1, Math.round(contentRect.width * devicePixelRatio));
      target.height = Math.max(1, Math.round((target.width * height) / width));
    }
    change({});
  };

  const listen = () => {
    const observer = new ResizeObserver(fit);
    for (const id of ["picture", "map"]) {
      at(id).style.aspectRatio = `${width} / ${height}`;
      observer.observe(at(id));
      const stage = at(`${id}-stage`);
      stage.addEventListener("pointermove", point);
      stage.addEventListener("pointerdown", point);
      stage.addEventListener("keydown", press);
    }
    at("pictures").addEventListener("change", (event) => {
      state.picture = Number(event.target.value);
      goToCostliest();
    });
    at("layer").addEventListener("change", (event) => {
      state.layer = Number(event.target.value);
      goToCostliest();
    });
    at("set").addEventListener("change", (event) => {
      state.set = Number(event.target.value);
      at("weight").value = learnedWeight();
      change({ weight: learnedWeight() });
    });
    at("weight").addEventListener("input", (event) => change({ weight: Number(event.target.value) }));
    at("opacity").addEventListener("input", () => change({}));
    at("costliest").addEventListener("click", goToCostliest);
  };

  const drawScale = () => at("scale").getContext("2d").putImageData(new ImageData(colours.map, 256, 1), 0, 0);

  const start = async () => {
    const sheets = data.layers.flatMap((it) => it.sets).filter((it) => it.image).map((it) => it.image);
    await Promise.all([...images, ...sheets].map((it) => it.decode()));
    // A browser may have kept what was chosen before the page was reloaded.
    state.picture = Number(document.querySelector("#pictures :checked").value);
    state.layer = Number(at("layer").value);
    state.set = Number(at("set").value);
    state.weight = learnedWeight();
    at("weight").value = state.weight;
    listen();
    drawScale();
    goToCostliest();
  };
  start();
}
