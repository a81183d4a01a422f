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
    const place = chart.data.labels.indexOf(chart.canvas.dataset.today);
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

function draw(canvas) {
  const kind = canvas.dataset.kind;
  const { labels, series } = read(document.getElementById(canvas.dataset.table), Number(canvas.dataset.columns || 0));
  const grid = { color: colour("--line") };
  const ticks = { color: colour("--dim"), maxRotation: 0, autoSkipPadding: 12 };
  Chart.getChart(canvas)?.destroy();
  new Chart(canvas, {
    type: kind === "line" ? "line" : "bar",
    data: { labels, datasets: series.map((one, place) => dataset(one, place, kind)) },
    options: {
      animation: false,
      maintainAspectRatio: false,
      interaction: { mode: "index", intersect: false },
      plugins: {
        legend: { display: series.length > 1, labels: { color: colour("--dim"), boxWidth: 18, usePointStyle: kind === "line", pointStyle: "line" } },
        tooltip: { callbacks: { label: (item) => `${item.dataset.label}: $${item.parsed.y.toFixed(4)}` } },
      },
      scales: {
        x: { stacked: kind === "stacked", grid: { display: false }, ticks },
        y: { stacked: kind === "stacked", beginAtZero: true, grid, ticks: { ...ticks, callback: (value) => `$${Number(value.toFixed(6))}` } },
      },
    },
    plugins: [today],
  });
}

function drawAll() {
  document.querySelectorAll("canvas[data-table]").forEach(draw);
}

drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
