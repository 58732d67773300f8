// What the canvases and charts share: colors that the color-blind can tell apart, and numbers as people read them.

export const isDark = () => document.body.classList.contains("body--dark");

// Each scale grows evenly in lightness, away from the page's background: more is farther from the paper.
const SCALES = {
  utilization: {
    dark: ["#1b2836", "#1c4a63", "#1f7a8c", "#45b08c", "#a5d86e", "#fbee6a"],
    light: ["#e9eef2", "#bfe0d6", "#74c2bb", "#2f97ad", "#1f6694", "#173a6b"],
  },
  memory: {
    dark: ["#1e2536", "#2f3b7a", "#5650b0", "#8d6fd0", "#c39ae6", "#f5d9ff"],
    light: ["#ecedf5", "#cfcbea", "#a99fdb", "#7f6cc4", "#573fa0", "#311a6b"],
  },
  temperature: {
    dark: ["#22263a", "#4a2a6a", "#8e2f78", "#d24a5f", "#f6894a", "#fde58a"],
    light: ["#f6efe4", "#fbd3a0", "#f79a5c", "#df5a4e", "#a82a63", "#571253"],
  },
};

// Okabe and Ito's palette: told apart by every common color blindness.
export const STATES = [
  { name: "free", dark: "#2b9c7e", light: "#3fb594" },
  { name: "leased in part", dark: "#4f9fd6", light: "#7cc0ee" },
  { name: "leased", dark: "#2474b5", light: "#2474b5" },
  { name: "throttled", dark: "#e6c93c", light: "#e3b505" },
  { name: "drained", dark: "#8a63b8", light: "#a487cc", mark: "bar" },
  { name: "no samples", dark: "#3a4654", light: "#c3ccd6", mark: "hollow" },
  { name: "unhealthy", dark: "#e0632a", light: "#d55e00", mark: "cross" },
  { name: "unusable", dark: "#5b6675", light: "#9aa5b1", mark: "bar" },
  { name: "in use without a lease", dark: "#c77aa8", light: "#cc79a7", mark: "bar" },
  { name: "reserved", dark: "#8c6d3f", light: "#b08d57", mark: "bar" },
];

export const SERIES = {
  dark: ["#4fb3d9", "#f0a34a", "#5cc48d", "#d98cc4", "#e0dd6a", "#e0764f", "#8f9ff0", "#a3b1bf"],
  light: ["#0072b2", "#d98200", "#00845f", "#b3558f", "#8f8400", "#c44e00", "#4b53b8", "#5b6b7b"],
};

function mix(from, to, share) {
  const part = (at) => {
    const a = parseInt(from.slice(at, at + 2), 16);
    const b = parseInt(to.slice(at, at + 2), 16);
    return Math.round(a + (b - a) * share);
  };
  return [part(1), part(3), part(5)];
}

const cache = new Map();

// 251 colors, one a level, as CSS and as whether black text is read on them.
export function scale(metric) {
  const key = metric + (isDark() ? "/dark" : "/light");
  if (!cache.has(key)) {
    const stops = SCALES[metric][isDark() ? "dark" : "light"];
    const colors = [];
    for (let level = 0; level <= 250; level++) {
      const place = (level / 250) * (stops.length - 1);
      const at = Math.min(Math.floor(place), stops.length - 2);
      const [r, g, b] = mix(stops[at], stops[at + 1], place - at);
      colors.push({ css: `rgb(${r},${g},${b})`, bright: 0.299 * r + 0.587 * g + 0.114 * b > 140 });
    }
    cache.set(key, colors);
  }
  return cache.get(key);
}

export function stateColor(state) {
  return STATES[state]?.[isDark() ? "dark" : "light"] ?? STATES[7].dark;
}

export function css(name) {
  return getComputedStyle(document.body).getPropertyValue(name).trim();
}

// A steady color for a name, such as an owner's.
export function nameColor(name) {
  let hash = 2166136261;
  for (let at = 0; at < name.length; at++) hash = Math.imul(hash ^ name.charCodeAt(at), 16777619);
  const colors = SERIES[isDark() ? "dark" : "light"].slice(0, 7);
  return colors[(hash >>> 0) % colors.length];
}

export function bytes(text) {
  const raw = atob(text);
  const made = new Uint8Array(raw.length);
  for (let at = 0; at < raw.length; at++) made[at] = raw.charCodeAt(at);
  return made;
}

export const uint16 = (text) => new Uint16Array(bytes(text).buffer);
export const uint32 = (text) => new Uint32Array(bytes(text).buffer);
export const float64 = (text) => new Float64Array(bytes(text).buffer);

// Whether the reader wants UTC; else times are in the browser's zone.
export const isUtc = () => document.cookie.split("; ").includes("corral_utc=1");

// A time as parts of year, month … second by the clocks of the reader's zone, as ISO 8601 without a zone.
export function wall(ms) {
  const at = new Date(ms);
  return new Date(isUtc() ? ms : ms - at.getTimezoneOffset() * 60000).toISOString();
}

// A time as people read it, with the name of the zone.
export function stamp(ms, length = 19) {
  const named = new Intl.DateTimeFormat("en", { timeZone: isUtc() ? "UTC" : undefined, timeZoneName: "short" }).formatToParts(new Date(ms));
  return `${wall(ms).replace("T", " ").slice(0, length)} ${named.find((part) => part.type === "timeZoneName").value}`;
}

// The step of an axis of bytes: a power of two, so that its ticks are round.
export const byteStep = (most) => 2 ** Math.ceil(Math.log2(Math.max(most, 4) / 4));

const BINARY = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

const UNITS = { "degrees Celsius": "celsius", "bytes per second": "bytes/s", megahertz: "MHz", nanoseconds: "ns", millijoules: "mJ", count: "", level: "" };

// A value in a unit of the catalog, short.
export function format(value, unit) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  unit = UNITS[unit] ?? unit;
  if (unit === "bytes" || unit === "bytes/s") {
    let at = 0;
    while (Math.abs(value) >= 1024 && at < BINARY.length - 1) {
      value /= 1024;
      at += 1;
    }
    return `${value.toFixed(at && Math.abs(value) < 100 ? 1 : 0)} ${BINARY[at]}${unit === "bytes/s" ? "/s" : ""}`;
  }
  const digits = Math.abs(value) >= 100 || Number.isInteger(value) ? 0 : Math.abs(value) >= 1 ? 1 : 3;
  const text = value.toLocaleString("en", { maximumFractionDigits: digits });
  if (unit === "percent") return `${text}%`;
  if (unit === "celsius") return `${text} °C`;
  if (unit === "watts") return Math.abs(value) >= 10000 ? `${(value / 1000).toFixed(1)} kW` : `${text} W`;
  return unit ? `${text} ${unit}` : text;
}

// Called again whenever the page turns dark or light.
export function onTheme(redraw) {
  let before = isDark();
  const observer = new MutationObserver(() => {
    if (isDark() !== before) {
      before = isDark();
      redraw();
    }
  });
  observer.observe(document.body, { attributes: true, attributeFilter: ["class"] });
  return () => observer.disconnect();
}

// A component that draws: again whenever its size or the theme changes, until it goes. It has draw(), and resized() where
// a change of size asks for something else.
export const drawn = {
  mounted() {
    this.observer = new ResizeObserver(() => (this.resized ?? this.draw)());
    this.observer.observe(this.$el);
    this.forget = onTheme(() => this.draw());
    this.$emit("ready");
  },
  beforeUnmount() {
    this.observer.disconnect();
    this.forget();
  },
};

// A canvas as sharp as the screen.
export function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

export const FONT = "Roboto, system-ui, sans-serif";

// Copy a text. Pages of plain HTTP have no clipboard, but may copy what is selected.
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = text;
    area.style.cssText = "position:fixed;top:0;opacity:0";
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
