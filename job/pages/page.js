"use strict";
// Draws the plots of a page, in the colours of its style sheet, and again where light, dark or paper change those.

const figures = [...document.querySelectorAll(".plot")];

async function loadLibrary() {
  const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim();
  return {ink: read("--ink"), quiet: read("--quiet"), line: read("--line"), paper: read("--paper"),
          series: read("--series").split(",").map((colour) => colour.trim())};
}

// As Plotly.relayout takes it: names with dots.
function themed() {
  const c = colours();
  const changes = {
    "font.color": c.ink, "colorway": c.series, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
    "hoverlabel.bgcolor": c.paper, "hoverlabel.bordercolor": c.line, "hoverlabel.font.color": c.ink,
    "modebar.color": c.quiet, "modebar.activecolor": c.ink, "modebar.bgcolor": "rgba(0,0,0,0)",
  };
  for (const axis of ["xaxis", "yaxis"]) {
    changes[axis + ".gridcolor"] = c.line;
    changes[axis + ".zerolinecolor"] = c.line;
    changes[axis + ".linecolor"] = c.line;
  }
  return changes;
}

function nested(changes) {
  const layout = {};
  for (const [name, value] of Object.entries(changes)) {
    const parts = name.split(".");
    const last = parts.pop();
    parts.reduce((inner, part) => (inner[part] ??= {}), layout)[last] = value;
  }
  return layout;
}

function merged(below, above) {
  const result = {...below};
  for (const [name, value] of Object.entries(above)) {
    const both = value && typeof value === "object" && !Array.isArray(value) && below[name];
    result[name] = both ? merged(below[name], value) : value;
  }
  return result;
}

function draw() {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  // A finger that moves over a plot scrolls the page; zooming is the buttons' there.
  const touched = matchMedia("(pointer: coarse)").matches;
  const base = merged(nested(themed()), {
    font: {family: getComputedStyle(document.body).fontFamily, size: 12},
    margin: {l: 55, r: 12, t: 28, b: 40},
    legend: {orientation: "h", x: 0, y: -0.2, yanchor: "top"},
    dragmode: touched ? false : "zoom",
    xaxis: {automargin: true, title: {standoff: 4}}, yaxis: {automargin: true, title: {standoff: 6}},
  });
  // The buttons are named one by one: among Plotly's own is one that sends the plot to its makers.
  const buttons = [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"], ["toImage"]];
  const config = {responsive: true, displaylogo: false, displayModeBar: touched ? true : "hover", modeBarButtons: buttons};
  for (const figure of figures) {
    const {traces, layout} = plots[figure.dataset.number];
    Plotly.newPlot(figure, traces, merged(base, layout), config);
  }
}

function redraw() {
  for (const figure of figures) Plotly.relayout(figure, themed()).then(() => Plotly.Plots.resize(figure));
}

async function start() {
  try {
    await loadLibrary();
    draw();
  } catch (error) {
    for (const figure of figures) figure.textContent = "This browser cannot draw the plot: " + error;
    throw error;
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  matchMedia("print").addEventListener("change", redraw);
  document.documentElement.dataset.drawn = figures.length;  // for whoever waits for it
}

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
});
if (figures.length) start();
