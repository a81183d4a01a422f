// Draws a chart from the table that says the same: the numbers are on the page once, in `data-value`, in micro-USD.
"use strict";

const MICRO_PER_USD = 1e6;

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function read(table, columns) {
  const heads = [...table.tHead.rows[0].cells].slice(1, columns ? 1 + columns : undefined);
  const rows = [...table.tBodies[0].rows];
  return {
    labels: rows.map((row) => row.cells[0].textContent.trim()),
    series: heads.map((head, place) => ({
      name: head.textContent.trim(),
      line: head.dataset.line,
      values: rows.map((row) => {
        const value = row.cells[place + 1].dataset.value;
        return value === undefined ? null : Number(value) / MICRO_PER_USD;
      }),
    })),
  };
}

function dataset(one, place, kind) {
  const tint = one.line === "limit" ? colour("--over") : one.line ? colour("--series-2") : colour(`--series-${place + 1}`);
  return {
    label: one.name,
    data: one.values,
    borderColor: tint,
    backgroundColor: tint,
    borderWidth: kind === "line" ? 2 : 0,
    borderDash: one.line ? [6, 4] : [],
    pointRadius: 0,
    pointHitRadius: 8,
    tension: 0,
    maxBarThickness: 36,
  };
}

// A line through today, so that what was and what may come are told apart.
const today = {
  id: "today",
  afterDatasetsDraw(chart) {
    const place = chart.data.labels.indexOf(chart.canvas.parentElement.dataset.today);
    if (place < 0) return;
    const x = chart.scales.x.getPixelForValue(place);
    const { top, bottom } = chart.chartArea;
    const context = chart.ctx;
    context.save();
    context.strokeStyle = context.fillStyle = colour("--dim");
    context.setLineDash([2, 3]);
    context.beginPath();
    context.moveTo(x, top);
    context.lineTo(x, bottom);
    context.stroke();
    context.fillText("today", x + 4, top + 10);
    context.restore();
  },
};

// Names have up to 64 characters, and a legend is no place for all of them: the tooltip and the table have them whole.
const LEGEND_CHARACTERS = 24;

function legend(chart) {
  const short = (text) => (text.length > LEGEND_CHARACTERS ? `${text.slice(0, LEGEND_CHARACTERS - 1)}…` : text);
  return Chart.defaults.plugins.legend.labels.generateLabels(chart).map((one) => ({ ...one, text: short(one.text) }));
}

function dollars(value, digits) {
  return `${value < 0 ? "-" : ""}$${Math.abs(value).toFixed(digits)}`;
}

// As many decimals as tell the steps of a scale apart.
function step(value, _place, ticks) {
  const distance = ticks.length > 1 ? Math.abs(ticks[1].value - ticks[0].value) : 1;
  return dollars(value, Math.max(0, Math.min(6, Math.ceil(-Math.log10(distance)))));
}

function options(kind, several) {
  const grid = { color: colour("--line") };
  const ticks = { color: colour("--dim"), maxRotation: 0, autoSkipPadding: 12 };
  return {
    animation: false,
    maintainAspectRatio: false,
    interaction: { mode: "index", intersect: false },
    plugins: {
      legend: { display: several, labels: { generateLabels: legend, color: colour("--dim"), boxWidth: 18, usePointStyle: kind === "line", pointStyle: "line" } },
      tooltip: { callbacks: { label: (item) => `${item.dataset.label}: ${dollars(item.parsed.y, 4)}` } },
    },
    scales: {
      x: { stacked: kind === "stacked", grid: { display: false }, ticks },
      y: { stacked: kind === "stacked", beginAtZero: true, grid, ticks: { ...ticks, callback: step } },
    },
  };
}

// What each canvas shows, as text: a chart whose table says nothing new is left alone.
const shown = new WeakMap();

function draw(canvas) {
  const kind = canvas.dataset.kind;
  const said = read(document.getElementById(canvas.dataset.table), Number(canvas.dataset.columns || 0));
  const text = JSON.stringify([said, dark.matches]);
  if (shown.get(canvas) === text) return;
  shown.set(canvas, text);
  const datasets = said.series.map((one, place) => dataset(one, place, kind));
  const chart = Chart.getChart(canvas);
  if (!chart) {
    new Chart(canvas, {
      type: kind === "line" ? "line" : "bar",
      data: { labels: said.labels, datasets },
      options: options(kind, datasets.length > 1),
      plugins: [today],
    });
    return;
  }
  // In place: what is hovered over stays so, and nothing is made anew.
  chart.data.labels = said.labels;
  datasets.forEach((one, place) => {
    chart.data.datasets[place] = Object.assign(chart.data.datasets[place] ?? {}, one);
  });
  chart.data.datasets.length = datasets.length;
  chart.options = options(kind, datasets.length > 1);
  chart.update("none");
}

const dark = matchMedia("(prefers-color-scheme: dark)");

function drawAll() {
  Object.values(Chart.instances).filter((chart) => !chart.canvas?.isConnected).forEach((chart) => chart.destroy());
  document.querySelectorAll("canvas[data-table]").forEach(draw);
}

drawAll();
dark.addEventListener("change", drawAll);
// The tables renew themselves every few seconds.
document.addEventListener("htmx:after:swap", drawAll);
