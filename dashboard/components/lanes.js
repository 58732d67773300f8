// Who held which device when: a lane a device, a bar a lease. Only the lanes in view are drawn.
import { FONT, css, drawn, float64, nameColor, sized, stamp, uint16, wall } from "corral-ui";

const LANE = 20;
const TOP = 26;

export default {
  mixins: [drawn],
  template: `
    <div class="lanes" @mouseleave="leave">
      <div ref="box" style="overflow-y:auto;overflow-x:hidden" @scroll="draw">
        <div :style="{height: height + 'px', position: 'relative'}">
          <canvas ref="canvas" style="position:sticky;top:0;display:block" role="img" :aria-label="label" @mousemove="move" @click="choose"></canvas>
        </div>
      </div>
      <div class="lanes-tip" v-show="tip.shown" :style="{left: tip.x + 'px', top: tip.y + 'px'}">
        <div class="heat-tip-title">{{ tip.title }}</div>
        <div v-for="line in tip.lines" style="color:var(--muted)">{{ line }}</div>
      </div>
    </div>`,
  data() {
    return { height: 60, label: "Leases over time", tip: { shown: false, x: 0, y: 0, title: "", lines: [] } };
  },
  created() {
    this.data = null;
  },
  methods: {
    show(data) {
      this.data = { ...data, lanes: uint16(data.lanes), leases: uint16(data.leases), from: float64(data.from), to: float64(data.to) };
      this.height = TOP + data.names.length * LANE + 4;
      this.$refs.box.style.height = `${Math.min(this.height, 560)}px`;
      this.label = `${data.leases.length} leases on ${data.names.length} devices over time`;
      this.$nextTick(() => this.draw());
    },
    draw() {
      cancelAnimationFrame(this.frame);
      this.frame = requestAnimationFrame(() => this.paint());
    },
    x(time) {
      const { start, end } = this.data;
      return this.left + ((time - start) / (end - start)) * (this.width - this.left);
    },
    paint() {
      if (!this.data || !this.$refs.box) return;
      const { names, start, end, lanes, leases, from, to, described } = this.data;
      const box = this.$refs.box;
      this.width = box.clientWidth;
      this.left = this.width < 560 ? 84 : 140;
      const view = Math.min(this.height, box.clientHeight);
      const context = sized(this.$refs.canvas, this.width, view);
      const scroll = box.scrollTop;
      const muted = css("--muted"), line = css("--line"), panel = css("--panel");
      context.textBaseline = "middle";
      const ticks = this.ticks(start, end, Math.max(2, Math.floor((this.width - this.left) / 110)));
      context.fillStyle = line;
      ticks.forEach((time) => context.fillRect(this.x(time), TOP - 6, 1, view));
      const first = Math.max(0, Math.floor((scroll - TOP) / LANE)), last = Math.min(names.length, Math.ceil((scroll + view - TOP) / LANE));
      context.font = `400 11.5px ${FONT}`;
      for (let lane = first; lane < last; lane++) {
        const y = TOP + lane * LANE - scroll;
        context.fillStyle = line;
        context.globalAlpha = 0.55;
        context.fillRect(this.left, y + LANE - 1, this.width - this.left, 1);
        context.globalAlpha = 1;
        context.fillStyle = muted;
        context.fillText(this.fit(context, names[lane], this.left - 10), 0, y + LANE / 2);
      }
      for (let at = 0; at < lanes.length; at++) {
        if (lanes[at] < first || lanes[at] >= last) continue;
        const [id, owner, name, state] = described[leases[at]];
        const a = Math.max(this.left, this.x(from[at])), b = Math.min(this.width, Math.max(this.x(to[at]), a + 2));
        const y = TOP + lanes[at] * LANE - scroll;
        context.globalAlpha = state === "active" ? 1 : 0.55;
        context.fillStyle = nameColor(owner);
        context.beginPath();
        context.roundRect(a, y + 2, b - a, LANE - 5, 3);
        context.fill();
        context.globalAlpha = 1;
        const words = name ? `${owner} · ${name}` : owner;
        if (b - a > 40) {
          context.save();
          context.beginPath();
          context.rect(a, y, b - a - 4, LANE);
          context.clip();
          context.font = `500 11px ${FONT}`;
          context.fillStyle = this.dark(nameColor(owner), state === "active" ? 1 : 0.55, panel) ? "rgba(255,255,255,.95)" : "rgba(8,16,24,.88)";
          context.fillText(words, a + 6, y + LANE / 2 - 0.5);
          context.restore();
          context.font = `400 11.5px ${FONT}`;
        }
      }
      // The head stands over the lanes.
      context.fillStyle = panel;
      context.fillRect(0, 0, this.width, TOP - 4);
      context.fillStyle = muted;
      context.font = `400 11px ${FONT}`;
      context.textAlign = "center";
      for (const time of ticks) {
        const x = this.x(time);
        if (x > this.left + 24 && x < this.width - 30) context.fillText(this.clock(time, end - start), x, 10);
      }
      context.textAlign = "left";
      this.$el.dataset.bars = lanes.length;
    },
    // Whether a color is dark as it is seen over another one.
    dark(color, alpha, below) {
      const part = (at) => alpha * parseInt(color.slice(at, at + 2), 16) + (1 - alpha) * parseInt(below.slice(at, at + 2), 16);
      return 0.299 * part(1) + 0.587 * part(3) + 0.114 * part(5) < 140;
    },
    ticks(start, end, most) {
      const steps = [60, 300, 600, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800, 1209600, 2592000, 7776000].map((s) => s * 1000);
      const step = steps.find((one) => (end - start) / one <= most) ?? steps.at(-1);
      const found = [];
      // Steps of hours and days begin at midnight of the reader's zone.
      const ahead = Date.parse(wall(start)) - start;
      for (let time = Math.ceil((start + ahead) / step) * step - ahead; time <= end; time += step) found.push(time);
      return found;
    },
    clock(time, length) {
      const iso = wall(time);
      return length > 2 * 86400000 ? iso.slice(5, 10) : iso.slice(11, 16);
    },
    fit(context, name, width) {
      if (context.measureText(name).width <= width) return name;
      let kept = name;
      while (kept.length > 1 && context.measureText("…" + kept).width > width) kept = kept.slice(1);
      return "…" + kept;
    },
    at(event) {
      const box = this.$refs.canvas.getBoundingClientRect();
      const x = event.clientX - box.left, y = event.clientY - box.top;
      const lane = Math.floor((y + this.$refs.box.scrollTop - TOP) / LANE);
      if (lane < 0 || y < TOP || lane >= this.data.names.length) return { lane: -1, bar: -1, x, y };
      if (x < this.left) return { lane, bar: -1, x, y };
      for (let bar = this.data.lanes.length - 1; bar >= 0; bar--) {
        if (this.data.lanes[bar] !== lane) continue;
        if (x >= this.x(this.data.from[bar]) - 1 && x <= Math.max(this.x(this.data.to[bar]), this.x(this.data.from[bar]) + 2)) return { lane, bar, x, y };
      }
      return { lane, bar: -1, x, y };
    },
    move(event) {
      if (!this.data) return;
      const { lane, bar, x, y } = this.at(event);
      this.$refs.canvas.style.cursor = lane >= 0 ? "pointer" : "default";
      this.tip.shown = bar >= 0;
      if (bar < 0) return;
      const [id, owner, name, state] = this.data.described[this.data.leases[bar]];
      const time = (ms) => stamp(ms);
      this.tip.title = name ? `${owner} · ${name}` : owner;
      this.tip.lines = [this.data.names[lane], `${time(this.data.from[bar])} to ${state === "active" ? "now" : time(this.data.to[bar])}`, `${state} · ${id}`];
      this.tip.x = Math.min(x + 14, this.width - 286);
      this.tip.y = y + 18;
    },
    leave() {
      this.tip.shown = false;
    },
    choose(event) {
      if (!this.data) return;
      const { lane } = this.at(event);
      if (lane >= 0) this.$emit("open", lane);
    },
  },
};
