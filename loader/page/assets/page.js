"use strict";
// Draws the charts of the page, and makes its heatmap and buttons work. It fetches nothing.
const quantloadPage = (() => {
  const UNITS = [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]];
  const drawn = new Map();
  let data = {};

  function size(bytes) {
    const [unit, factor] = UNITS.find(([, each]) => Math.abs(bytes) >= each) || ["B", 1];
    return `${Number((bytes / factor).toPrecision(3))} ${unit}`;
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  const narrow = () => innerWidth < 600;

  // A step on the axis that is a round number of binary units.
  function step(highest) {
    const [, factor] = UNITS.find(([, each]) => highest >= each) || ["B", 1];
    const raw = highest / factor / 5;
    const ten = 10 ** Math.floor(Math.log10(raw));
    return factor * ten * [1, 2, 2.5, 5, 10].find((each) => each * ten >= raw);
  }

  function base() {
    const ink = colour("ink");
    return {
      animation: false,
      textStyle: { color: ink, fontFamily: "system-ui, sans-serif", fontSize: 13 },
      grid: { left: 8, right: 16, top: 36, bottom: 28, containLabel: true },
      tooltip: {
        trigger: "axis", confine: true, renderMode: "richText", backgroundColor: colour("card"),
        borderColor: colour("line"), textStyle: { color: ink },
      },
    };
  }

  function seconds(last) {
    return {
      type: "value", name: "seconds", nameLocation: "middle", nameGap: 26, min: 0, max: last,
      axisLabel: { color: colour("soft"), formatter: (value) => String(Number(value.toPrecision(3))), hideOverlap: true },
      nameTextStyle: { color: colour("soft") }, splitLine: { show: false }, axisLine: { lineStyle: { color: colour("soft") } },
    };
  }

  function bytesAxis(highest, suffix = "") {
    const each = step(highest);
    return {
      type: "value", min: 0, max: Math.ceil(highest / each) * each, interval: each,
      axisLabel: { color: colour("soft"), formatter: (value) => size(value) + suffix },
      splitLine: { lineStyle: { color: colour("line") } },
    };
  }

  // Stretches of time behind the curve, one a phase; those too short to hold their name have none.
  function phaseAreas(phases, last) {
    return {
      silent: true,
      data: phases.filter((each) => each.to > each.from).map((each, index) => [
        {
          name: (each.to - each.from) / last > 0.09 ? each.name : "", xAxis: each.from,
          itemStyle: { color: colour(index % 2 ? "six" : "one"), opacity: 0.08 },
          label: { color: colour("soft"), position: "insideTop", fontSize: 12 },
        },
        { xAxis: Math.min(each.to, last) },
      ]),
    };
  }

  function memoryOption({ points, lines, phases }) {
    const last = Math.max(1e-6, ...points.map((each) => each[0]));
    const highest = 1.08 * Math.max(1, ...points.map((each) => each[1]), ...lines.map((each) => each.bytes));
    const colours = { peak: "five", final: "three", "predicted peak": "two", "as 16 bits": "six", limit: "four", available: "six" };
    return {
      ...base(), grid: { ...base().grid, top: 14 + 24 * legendRows(["memory", ...lines.map(({ name, bytes }) => `${name} ${size(bytes)}`)]) },
      xAxis: seconds(last), yAxis: bytesAxis(highest), legend: legend(),
      series: [
        {
          name: "memory", type: "line", data: points, showSymbol: points.length < 8, symbolSize: 7,
          lineStyle: { width: 2.5, color: colour("one") }, itemStyle: { color: colour("one") },
          areaStyle: { color: colour("one"), opacity: 0.15 }, markArea: phaseAreas(phases, last),
          tooltip: { valueFormatter: size },
        },
        ...lines.map(({ name, bytes }) => ({
          name: `${name} ${size(bytes)}`, type: "line", symbol: "none", data: [[0, bytes], [last, bytes]],
          lineStyle: { width: 1.5, type: name === "limit" || name === "peak" ? "solid" : "dashed", color: colour(colours[name] || "six") },
          itemStyle: { color: colour(colours[name] || "six") }, tooltip: { show: false },
        })),
      ],
    };
  }

  // As the library breaks them: a sign and a gap of 42 pixels, and 7 a letter, which is rather too much.
  function legendRows(names) {
    const room = Math.min(innerWidth, 1056) - 70;
    let rows = 1, used = 0;
    for (const name of names) {
      const width = 42 + 7 * name.length;
      if (used && used + width > room) { rows += 1; used = 0; }
      used += width;
    }
    return rows;
  }

  function legend() {
    return { type: "plain", top: 0, left: 0, itemGap: 8, textStyle: { color: colour("ink") } };
  }

  function bytesOption({ names, before, after }) {
    const highest = 1.02 * Math.max(1, ...before, ...after);
    const bar = (name, values, kind) => ({
      name, type: "bar", data: values, itemStyle: { color: colour(kind) }, barMaxWidth: 18,
      tooltip: { valueFormatter: size },
    });
    return {
      ...base(), legend: legend(), xAxis: { ...bytesAxis(highest), splitNumber: 4, axisLabel: { ...bytesAxis(highest).axisLabel, hideOverlap: true } },
      yAxis: {
        type: "category", data: names, inverse: true, axisTick: { show: false }, axisLine: { lineStyle: { color: colour("soft") } },
        axisLabel: { color: colour("ink"), lineHeight: 15, width: narrow() ? 104 : 220, overflow: "break" },
      },
      series: [bar("in the checkpoint", before, "six"), bar("in the model", after, "one")],
    };
  }

  function throughputOption({ points, phases }) {
    const last = Math.max(1e-6, ...points.map((each) => each[0]), ...phases.map((each) => each.to));
    return {
      ...base(), grid: { ...base().grid, top: 12 }, xAxis: seconds(last), yAxis: bytesAxis(1.1 * Math.max(1, ...points.map((each) => each[1])), "/s"),
      series: [{
        name: "read", type: "line", data: points, symbol: "none", lineStyle: { width: 2, color: colour("three") },
        itemStyle: { color: colour("three") }, areaStyle: { color: colour("three"), opacity: 0.15 },
        markArea: phaseAreas(phases, last), tooltip: { valueFormatter: (value) => `${size(value)}/s` },
      }],
    };
  }

  const OPTIONS = { memory: memoryOption, bytes: bytesOption, throughput: throughputOption };

  function draw(place) {
    const values = data[place.dataset.chart];
    if (!values) return;
    if (place.dataset.chart === "bytes") place.style.height = `${90 + 56 * values.names.length}px`;
    drawn.get(place)?.dispose();
    const chart = echarts.init(place, null, { renderer: "svg" });
    chart.setOption(OPTIONS[place.dataset.chart](values));
    drawn.set(place, chart);
    // The picture is one image with a name; its parts say nothing to a screen reader, the table below says it.
    place.firstElementChild?.setAttribute("aria-hidden", "true");
  }

  function drawAll() {
    for (const place of document.querySelectorAll("[data-chart]")) draw(place);
  }

  function sayAbove() {
    const place = document.getElementById("chart-memory");
    const above = data.memory?.above || [];
    if (!place || !above.length || place.nextElementSibling?.className === "above") return;
    const said = document.createElement("p");
    said.className = "above";
    said.textContent = `Too high to be drawn: ${above.map((each) => `${each.name} ${size(each.bytes)}`).join(", ")}.`;
    place.after(said);
  }

  // One cell takes part in the order of the tab key; arrows go from cell to cell.
  function makeHeatmap(table) {
    const said = document.getElementById("cell-said");
    const rows = [...table.tBodies[0].rows].map((row) => [...row.cells]);
    const say = (cell) => { if (cell?.title) said.textContent = cell.title; };
    const first = rows.flat().find((cell) => cell.title);
    if (first) first.tabIndex = 0;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    table.addEventListener("pointerover", (event) => say(event.target.closest("td")));
    table.addEventListener("focusin", (event) => say(event.target.closest("td")));
    table.addEventListener("click", (event) => go(event.target.closest("td")));
    table.addEventListener("keydown", (event) => {
      const move = moves[event.key];
      const from = event.target.closest("td");
      if (!move || !from) return;
      event.preventDefault();
      let row = from.parentElement.rowIndex - 1, column = from.cellIndex;
      do { row += move[0]; column += move[1]; } while (rows[row]?.[column] && !rows[row][column].title);
      go(rows[row]?.[column]);
    });
    function go(cell) {
      if (!cell?.title || cell.tagName !== "TD") return;
      for (const each of table.querySelectorAll("td[tabindex]")) each.tabIndex = -1;
      cell.tabIndex = 0;
      cell.focus();
    }
  }

  function makeCopyButtons() {
    for (const button of document.querySelectorAll("button[data-copy]")) {
      button.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(button.dataset.copy);
          button.textContent = "Copied";
        } catch {
          getSelection().selectAllChildren(button.parentElement.querySelector("code"));
          button.textContent = "Selected: copy it";
        }
      });
    }
  }

  // What is in the page now; a server's page calls it again when it has the report.
  function start(given) {
    data = given || JSON.parse(document.getElementById("chart-data").textContent);
    drawAll();
    sayAbove();
    for (const table of document.querySelectorAll(".heatmap table")) makeHeatmap(table);
    makeCopyButtons();
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", drawAll);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) { width = innerWidth; requestAnimationFrame(drawAll); }
  });
  start();
  return { start, size, draw, chart: memoryOption };
})();
