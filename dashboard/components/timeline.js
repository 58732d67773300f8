// Metrics over time, one below the other on one time axis; drag to look closer.
import { echarts } from "nicegui-echart";
import { FONT, SERIES, byteStep, bytes, css, drawn, float64, format, isDark, isUtc, nameColor, stamp } from "corral-ui";

const PANEL = 104;
const STEP = 148;
const WORDS = { gpu_utilization_percent: "Utilization", memory_used_bytes: "Memory in use", temperature_celsius: "Temperature", power_watts: "Power" };

function words(metric) {
  const plain = metric.replace(/_(percent|bytes|celsius|watts|megahertz|count)$/, "").replaceAll("_", " ");
  return WORDS[metric] ?? plain.charAt(0).toUpperCase() + plain.slice(1);
}

const CELSIUS = "degrees Celsius";

export default {
  mixins: [drawn],
  template: `
    <div class="timeline" style="position:relative" @pointerdown="down" @pointermove="drag" @pointerup="up" @pointercancel="cancel">
      <div ref="chart" style="width:100%"></div>
      <div ref="picked" style="position:absolute;top:0;bottom:0;pointer-events:none;display:none;border-radius:4px"></div>
    </div>`,
  props: {},
  created() {
    this.data = null;
    this.from = null;
  },
  mounted() {
    this.chart = echarts.init(this.$refs.chart, null, { renderer: "canvas", height: STEP });
  },
  beforeUnmount() {
    this.chart.dispose();
  },
  methods: {
    resized() {
      this.chart.resize();
    },
    show(data) {
      this.data = {
        ...data,
        series: data.series.map((one) => {
          const times = float64(one.times);
          const values = (text) => (text ? new Float32Array(bytes(text).buffer) : null);
          return { ...one, times, mean: values(one.mean) ?? new Float32Array(), low: values(one.low), high: values(one.high) };
        }),
      };
      this.draw();
    },
    draw() {
      if (!this.data) return;
      const { series, start, end, leases, events } = this.data;
      const text = css("--text"), muted = css("--muted"), line = css("--line");
      const colors = SERIES[isDark() ? "dark" : "light"];
      const narrow = this.$el.clientWidth < 560;
      const left = narrow ? 46 : 62;
      const axes = series.map((_, at) => at);
      const rows = [];
      series.forEach((one, at) => {
        const color = colors[at % colors.length];
        const pairs = (values) => Array.from(values, (value, n) => [one.times[n], Number.isNaN(value) ? null : value]);
        const base = { type: "line", xAxisIndex: at, yAxisIndex: at, showSymbol: false, animation: false, connectNulls: false, emphasis: { disabled: true } };
        if (one.low) {
          rows.push({ ...base, name: "low", stack: `band${at}`, stackStrategy: "all", lineStyle: { opacity: 0 }, tooltip: { show: false }, data: pairs(one.low), silent: true });
          rows.push({ ...base, name: "band", stack: `band${at}`, stackStrategy: "all", lineStyle: { opacity: 0 }, areaStyle: { color: color, opacity: 0.2 }, silent: true,
            data: Array.from(one.high, (value, n) => [one.times[n], Number.isNaN(value) ? null : value - one.low[n]]) });
        }
        rows.push({
          ...base,
          name: one.metric,
          data: pairs(one.mean),
          lineStyle: { width: 1.6, color: color },
          itemStyle: { color: color },
          areaStyle: one.low ? undefined : { color: color, opacity: 0.1 },
          markArea: {
            silent: true,
            data: leases.map((lease) => [
              { xAxis: Math.max(start, lease.started), itemStyle: { color: nameColor(lease.owner), opacity: at ? 0.07 : 0.13 },
                label: { show: at === 0 && ((Math.min(end, lease.ended) - Math.max(start, lease.started)) / (end - start)) * this.$el.clientWidth > 90, position: "insideBottomLeft", color: muted, fontSize: 10.5, fontFamily: FONT, formatter: lease.name ? `${lease.owner} · ${lease.name}` : lease.owner, overflow: "truncate" } },
              { xAxis: Math.min(end, lease.ended) },
            ]),
          },
          markLine: {
            silent: true, symbol: "none", label: { show: false },
            data: events.map((event) => ({ xAxis: event.t, lineStyle: { type: "dashed", width: 1.2, color: event.bad ? css("--bad") : css("--warn") } })),
          },
        });
      });
      const height = series.length * STEP + 20;
      this.chart.resize({ height });
      this.chart.setOption(
        {
          animation: false,
          useUTC: isUtc(),
          textStyle: { fontFamily: FONT },
          title: series.map((one, at) => ({ text: words(one.metric), left: 0, top: at * STEP, textStyle: { color: text, fontSize: 13, fontWeight: 500 } })),
          grid: series.map((_, at) => ({ left, right: 8, top: at * STEP + 28, height: PANEL })),
          xAxis: axes.map((at) => ({
            type: "time", gridIndex: at, min: start, max: end,
            axisLine: { lineStyle: { color: line } }, axisTick: { show: false }, splitLine: { show: false },
            axisLabel: { show: at === series.length - 1, color: muted, fontSize: 11, hideOverlap: true, showMinLabel: false, showMaxLabel: false }, splitNumber: narrow ? 3 : 7,
          })),
          yAxis: series.map((one, at) => ({
            type: "value", gridIndex: at,
            // Of temperatures whole tens: a degree up and down is no mountain.
            ...this.scale(one), splitNumber: 2,
            axisLabel: { color: muted, fontSize: 11, formatter: (value) => format(value, one.unit) }, splitLine: { lineStyle: { color: line } },
          })),
          axisPointer: { link: [{ xAxisIndex: "all" }], lineStyle: { color: muted } },
          tooltip: {
            trigger: "axis", confine: true, backgroundColor: css("--raised"), borderColor: css("--line-strong"), textStyle: { color: text, fontSize: 12, fontFamily: FONT },
            formatter: (found) => this.tell(found),
          },
          series: rows,
        },
        { notMerge: true },
      );
      this.$el.dataset.points = series[0]?.times.length ?? 0;
      this.$el.dataset.drawn = Number(this.$el.dataset.drawn ?? 0) + 1;
    },
    // Ends of an axis and its ticks, which are round and equally far from each other.
    scale({ metric, unit, low, mean, high }) {
      if (unit === "percent") return { min: 0, max: 100, interval: 50 };
      if (unit === "bytes") {
        const most = metric === "memory_used_bytes" && this.data.memory ? this.data.memory : most_of(high ?? mean);
        const interval = byteStep(most);
        return { min: 0, max: interval * Math.max(1, Math.ceil(most / interval)), interval };
      }
      if (unit === CELSIUS) {
        // A degree up and down is no mountain.
        const from = 20 * Math.floor((least_of(low ?? mean) - 1) / 20), to = 20 * Math.ceil((most_of(high ?? mean) + 1) / 20);
        return from < to ? { min: from, max: to, interval: to - from > 60 ? 40 : 20 } : {};
      }
      return { min: unit === "watts" ? 0 : undefined, scale: true };
    },
    // Texts of the fleet are only ever put in as text: this is built of elements.
    tell(found) {
      if (!found.length) return "";
      const box = document.createElement("div");
      const add = (tag, words, style) => {
        const made = box.appendChild(document.createElement(tag));
        made.textContent = words;
        made.style.cssText = style;
      };
      const t = found[0].axisValue;
      add("div", stamp(t), "opacity:.7;margin-bottom:4px");
      this.data.series.forEach((one) => {
        const at = nearest(one.times, t);
        if (at < 0) return;
        const span = one.low ? `  (${format(one.low[at], one.unit)} to ${format(one.high[at], one.unit)})` : "";
        add("div", `${words(one.metric)}: ${format(one.mean[at], one.unit)}${span}`, "line-height:19px");
      });
      return box;
    },
    time(event) {
      const box = this.$refs.chart.getBoundingClientRect();
      const x = Math.min(Math.max(event.clientX - box.left, 0), box.width);
      const t = this.chart.convertFromPixel({ xAxisIndex: 0 }, x);
      return { x, t: Math.min(Math.max(t, this.data.start), this.data.end) };
    },
    down(event) {
      if (event.pointerType !== "mouse" || event.button || !this.data) return;
      this.from = this.time(event);
    },
    drag(event) {
      if (!this.from) return;
      const to = this.time(event);
      const style = this.$refs.picked.style;
      if (Math.abs(to.x - this.from.x) < 6) return;
      style.display = "block";
      style.left = `${Math.min(to.x, this.from.x)}px`;
      style.width = `${Math.abs(to.x - this.from.x)}px`;
      style.background = `color-mix(in srgb, ${css("--accent")} 18%, transparent)`;
    },
    up(event) {
      if (!this.from) return;
      const to = this.time(event), from = this.from;
      this.cancel();
      if (Math.abs(to.x - from.x) >= 6) this.$emit("zoom", [Math.min(from.t, to.t) / 1000, Math.max(from.t, to.t) / 1000]);
    },
    cancel() {
      this.from = null;
      this.$refs.picked.style.display = "none";
    },
  },
};

const known = (values) => values.filter((value) => !Number.isNaN(value));
const most_of = (values) => known(values).reduce((most, value) => Math.max(most, value), 0);
const least_of = (values) => known(values).reduce((least, value) => Math.min(least, value), Infinity);

function nearest(times, t) {
  let low = 0, high = times.length - 1;
  if (high < 0) return -1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (times[middle] < t) low = middle + 1;
    else high = middle;
  }
  return low && t - times[low - 1] < times[low] - t ? low - 1 : low;
}
