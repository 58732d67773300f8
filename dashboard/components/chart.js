// The result of a question as bars or lines.
import { echarts } from "nicegui-echart";
import { FONT, SERIES, byteStep, css, drawn, format, isDark, isUtc, stamp } from "corral-ui";

export default {
  mixins: [drawn],
  template: `<div class="chart"></div>`,
  created() {
    this.data = null;
  },
  mounted() {
    this.chart = echarts.init(this.$el, null, { renderer: "canvas" });
  },
  beforeUnmount() {
    this.chart.dispose();
  },
  methods: {
    resized() {
      this.chart.resize();
    },
    show(data) {
      this.data = data;
      this.draw();
    },
    draw() {
      if (!this.data) return;
      const { kind, labels, series, unit, window } = this.data;
      const bars = kind === "bar" || kind === "bars";
      const stacked = kind === "stack" || kind === "bars";
      const text = css("--text"), muted = css("--muted"), line = css("--line");
      this.$el.style.height = bars ? `${Math.max(160, labels.length * (series.length > 1 && !stacked ? 34 : 26) + 64)}px` : "300px";
      this.chart.resize();
      const value = {
        type: "value", axisLabel: { color: muted, fontSize: 11, formatter: (one) => format(one, unit), hideOverlap: true }, splitLine: { lineStyle: { color: line } },
        max: unit === "percent" ? (range) => (range.max > 60 ? 100 : null) : undefined, splitNumber: 4,
        interval: unit === "bytes" ? byteStep(Math.max(...series.flatMap((one) => one.values))) : undefined,
      };
      const narrow = this.$el.clientWidth < 560;
      const axis = bars
        ? { type: "category", data: labels, inverse: true, axisLine: { show: false }, axisTick: { show: false }, axisLabel: { color: text, fontSize: 12, width: narrow ? 140 : 230, overflow: "truncate" } }
        : { type: "time", min: window?.[0], max: window?.[1], axisLine: { lineStyle: { color: line } }, axisTick: { show: false }, splitLine: { show: false }, axisLabel: { color: muted, fontSize: 11, hideOverlap: true } };
      const colors = SERIES[isDark() ? "dark" : "light"];
      this.chart.setOption(
        {
          animation: false, useUTC: isUtc(), textStyle: { fontFamily: FONT }, color: colors,
          grid: { left: 4, right: 24, top: series.length > 1 ? 36 : 12, bottom: 4, containLabel: true },
          legend: series.length > 1 ? { left: 0, top: 0, icon: "roundRect", itemWidth: 12, itemHeight: 8, textStyle: { color: muted, fontSize: 12 } } : { show: false },
          xAxis: bars ? value : axis, yAxis: bars ? axis : value,
          tooltip: {
            trigger: "axis", confine: true, axisPointer: { type: bars ? "shadow" : "line" }, backgroundColor: css("--raised"), borderColor: css("--line-strong"),
            textStyle: { color: text, fontSize: 12 }, formatter: (found) => this.tell(found),
          },
          series: series.map((one) => ({
            name: one.name, color: colors[one.color], type: stacked || bars ? "bar" : kind, stack: stacked ? "all" : undefined, animation: false, barMaxWidth: 16, barGap: "10%", showSymbol: labels.length < 40, symbolSize: 5,
            itemStyle: bars && !stacked ? { borderRadius: [0, 3, 3, 0] } : {}, lineStyle: { width: 1.8 },
            data: bars ? one.values : one.values.map((value, at) => [labels[at], value]),
          })),
        },
        { notMerge: true },
      );
      this.$el.dataset.points = labels.length;
    },
    tell(found) {
      const box = document.createElement("div");
      const head = box.appendChild(document.createElement("div"));
      const bars = this.data.kind === "bar" || this.data.kind === "bars";
      head.textContent = bars ? found[0].name : stamp(found[0].axisValue, 16);
      head.style.cssText = "font-weight:500;margin-bottom:3px";
      for (const one of found) {
        const row = box.appendChild(document.createElement("div"));
        row.textContent = `${one.seriesName}: ${format(bars ? one.value : one.value[1], this.data.unit)}`;
      }
      return box;
    },
  },
};
