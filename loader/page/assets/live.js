"use strict";
// The page of a server. The key is in a variable of this script and nowhere else.
(() => {
  const place = (id) => document.getElementById(id);
  const { size } = quantloadPage;
  const AGAIN_AFTER = 1000;
  let key = "";
  let points = [];
  let drawn = 0;

  async function ask(path) {
    // A header holds bytes, and the server wants those of UTF-8.
    const bytes = String.fromCharCode(...new TextEncoder().encode(key.trim()));
    const headers = key ? { Authorization: `Bearer ${bytes}` } : {};
    const answer = await fetch(path, { headers, cache: "no-store", credentials: "omit" });
    if (answer.status === 401) throw new Refused();
    return answer;
  }

  class Refused extends Error {}

  function duration(seconds) {
    return seconds < 100 ? `${seconds.toFixed(1)} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  }

  function tile(name, value) {
    const outer = document.createElement("div");
    for (const [tag, text] of [["dt", name], ["dd", value]]) {
      const inner = document.createElement(tag);
      inner.textContent = text;
      outer.append(inner);
    }
    return outer;
  }

  function showMoment(moment) {
    place("live").hidden = false;
    place("live-title").textContent = `Loading ${moment.model}`;
    const { bytes_read: read, bytes_total: total, seconds, memory } = moment;
    const speed = moment.bytes_per_second;
    const left = speed > 0 && total > read ? `, about ${duration((total - read) / speed)} left` : "";
    place("live-line").textContent = total ? `${Math.floor((100 * read) / total)} % read${left}` : "Not reading yet";
    place("live-bar").value = total ? read / total : 0;
    if (place("live-phase").textContent !== `Phase: ${moment.phase}`) place("live-phase").textContent = `Phase: ${moment.phase}`;
    const limit = moment.limit_bytes ?? moment.available_bytes;
    const tiles = [tile("Read", total ? `${size(read)} of ${size(total)}` : "–"), tile("Speed", speed ? `${size(speed)}/s` : "–"), tile("Memory", size(memory)), tile("Time", duration(seconds))];
    if (moment.predicted_peak_bytes) tiles.push(tile("Predicted peak", size(moment.predicted_peak_bytes)));
    if (limit) tiles.push(tile(moment.limit_bytes ? "Limit" : "Available", size(limit)));
    place("live-tiles").replaceChildren(...tiles);
    if (!points.length || seconds > points.at(-1)[0]) points.push([seconds, Math.max(0, memory)]);
    if (points.length > 600) points = points.filter((_, index) => index % 2 === 0);
    if (Date.now() - drawn > 900 && points.length > 1) {
      drawn = Date.now();
      const highest = 5 * Math.max(1, ...points.map((each) => each[1]));
      const lines = [["predicted peak", moment.predicted_peak_bytes], ["limit", limit]].filter(([, bytes]) => bytes && bytes <= highest);
      const chart = echarts.getInstanceByDom(place("live-chart")) || echarts.init(place("live-chart"), null, { renderer: "svg" });
      chart.setOption(quantloadPage.chart({ points, lines: lines.map(([name, bytes]) => ({ name, bytes })), phases: [] }), true);
    }
  }

  // Events as a server sends them, of which only `event` and `data` are used.
  async function* events(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += value;
      const parts = held.split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        const fields = Object.fromEntries(part.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
        yield { name: fields.event, data: JSON.parse(fields.data) };
      }
    }
  }

  async function showPage() {
    const answer = await ask("load_page");
    const { title, html, data } = await answer.json();
    place("live").hidden = true;
    document.title = title;
    place("report").innerHTML = html; // the server has escaped what is not its own
    quantloadPage.start(data);
  }

  async function follow() {
    for (;;) {
      try {
        const answer = await ask("load_events");
        if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
        place("trouble").textContent = "";
        for await (const { name, data } of events(answer)) {
          if (name === "moment") showMoment(data);
          else return await showPage();
        }
      } catch (error) {
        if (error instanceof Refused) throw error;
        place("trouble").textContent = `No answer from the server (${error.message}); asking again.`;
      }
      await new Promise((resolve) => setTimeout(resolve, AGAIN_AFTER));
    }
  }

  async function begin() {
    try {
      await follow();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      place("refused").textContent = key ? "The server does not take this key." : "";
      key = "";
      place("sign-in").hidden = false;
      place("key").focus();
    }
  }

  place("sign-in").addEventListener("submit", (event) => {
    event.preventDefault();
    key = place("key").value;
    place("key").value = "";
    place("sign-in").hidden = true;
    begin();
  });
  begin();
})();
