// A cell a device, on one canvas: five thousand of them are drawn in a few milliseconds.
import { FONT, STATES, bytes, css, drawn, scale, sized, stateColor, uint16, uint32 } from "corral-ui";

const UNKNOWN = 255;
const LEAST = 9;
const MOST = 72;
const GAP = 2;
const BAND = 22;
const RANGES = { utilization: [0, 100, "%"], memory: [0, 100, "%"], temperature: [25, 95, "°C"] };

export default {
  mixins: [drawn],
  template: `
    <div class="heat" @mouseleave="leave">
      <div class="heat-legend" role="note">
        <template v-if="metric === 'health'">
          <span v-for="state in states" class="heat-key"><i :style="{background: state.color}"></i>{{ state.name }}
            <b>{{ state.count.toLocaleString("en") }}</b></span>
        </template>
        <template v-else>
          <canvas ref="scale" class="heat-scale" aria-hidden="true"></canvas>
        </template>
      </div>
      <canvas ref="cells" class="heat-cells" tabindex="0" role="application" :aria-label="label"
        @mousemove="move" @click="choose" @keydown="key" @blur="leave"></canvas>
      <div class="heat-focus" v-show="ring.shown" :style="ring.style" aria-hidden="true"></div>
      <div class="heat-tip" ref="tip" v-show="tip.shown" :style="{left: tip.x + 'px', top: tip.y + 'px'}">
        <div class="heat-tip-title">{{ tip.title }}</div>
        <div class="heat-tip-row" v-for="row in tip.rows"><span>{{ row[0] }}</span><b>{{ row[1] }}</b></div>
      </div>
    </div>`,
  props: { metric: String },
  data() {
    return { tip: { shown: false, x: 0, y: 0, title: "", rows: [], number: -1 }, ring: { shown: false, style: {} }, states: [], label: "Heat map" };
  },
  watch: {
    metric() {
      this.draw();
    },
  },
  created() {
    // Not reactive: Vue need not look at thousands of numbers.
    this.plan = null;
    this.levels = new Uint8Array();
    this.health = new Uint8Array();
    this.focus = -1;
    this.frames = 0;
    this.whole = true;
    this.stale = new Set();
  },
  beforeUnmount() {
    cancelAnimationFrame(this.frame);
  },
  methods: {
    resized() {
      this.arrange();
    },
    setLayout(layout, levels, health) {
      this.plan = { ...layout, order: uint32(layout.order), indices: uint16(layout.indices) };
      this.levels = bytes(levels);
      this.health = bytes(health);
      this.label = `Heat map of ${this.plan.order.length} devices by ${this.metric}. Arrow keys move, Enter opens.`;
      this.leave();
      this.arrange();
    },
    change(levels, health) {
      const changed = new Set();
      if (levels) this.apply(this.levels, levels, changed);
      if (health) this.apply(this.health, health, changed);
      changed.forEach((device) => this.stale.add(device));
      this.draw(false);
    },
    // Takes an update over, and notes which devices it changes.
    apply(before, update, changed) {
      if (update.full) {
        bytes(update.full).forEach((level, device) => {
          if (before[device] !== level) changed.add(device);
          before[device] = level;
        });
        return;
      }
      const at = uint16(update.at), to = bytes(update.to);
      for (let n = 0; n < at.length; n++) {
        before[at[n]] = to[n];
        changed.add(at[n]);
      }
    },
    // Where each cell lies: blocks side by side for many small groups, bands for few large ones.
    arrange() {
      if (!this.plan || !this.$el?.clientWidth) return;
      const width = this.$el.clientWidth;
      const { counts } = this.plan;
      const greatest = Math.max(1, ...counts);
      const blocks = greatest <= 16;
      const room = Math.max(320, window.innerHeight - this.$refs.cells.getBoundingClientRect().top - window.scrollY - 48);
      let made = null;
      for (let cell = MOST; cell >= LEAST; cell--) {
        made = blocks ? this.inBlocks(width, cell, greatest) : this.inBands(width, cell);
        if (made.height <= room) break;
      }
      Object.assign(this, made, { width });
      this.places = new Int32Array(this.plan.total).fill(-1);
      this.plan.order.forEach((device, at) => (this.places[device] = at));
      this.draw();
    },
    inBlocks(width, cell, greatest) {
      const pitch = cell + GAP;
      let columns = Math.min(greatest, 8);
      while (columns > 2 && columns * pitch > width) columns = Math.ceil(columns / 2);
      const label = cell >= 14 ? 18 : 13;
      const blockWidth = Math.max(columns * pitch - GAP, cell >= 14 ? 64 : 44);
      const across = Math.max(1, Math.floor((width + 14) / (blockWidth + 14)));
      const spread = across > 1 && this.plan.counts.length >= across ? (width - across * blockWidth) / (across - 1) : 14;
      const gap = Math.min(spread, 28);
      const xs = [], ys = [], heads = [];
      let y = 0, tallest = 0, at = 0;
      this.plan.counts.forEach((count, group) => {
        const column = group % across;
        if (column === 0 && group) {
          y += tallest + (cell >= 14 ? 16 : 9);
          tallest = 0;
        }
        const x = Math.round(column * (blockWidth + gap));
        heads.push([x, y, blockWidth]);
        for (let n = 0; n < count; n++, at++) {
          xs[at] = x + (n % columns) * pitch;
          ys[at] = y + label + Math.floor(n / columns) * pitch;
        }
        tallest = Math.max(tallest, label + Math.ceil(count / columns) * pitch);
      });
      return { xs, ys, heads, cell, label, height: y + tallest };
    },
    inBands(width, cell) {
      const pitch = cell + GAP;
      const columns = Math.max(1, Math.floor((width + GAP) / pitch));
      const xs = [], ys = [], heads = [];
      let y = 0, at = 0;
      this.plan.counts.forEach((count, group) => {
        if (group) y += 16;
        heads.push([0, y, width]);
        y += BAND;
        for (let n = 0; n < count; n++, at++) {
          xs[at] = (n % columns) * pitch;
          ys[at] = y + Math.floor(n / columns) * pitch;
        }
        y += Math.ceil(count / columns) * pitch;
      });
      return { xs, ys, heads, cell, label: BAND, height: y };
    },
    draw(whole = true) {
      this.whole ||= whole;
      cancelAnimationFrame(this.frame);
      this.frame = requestAnimationFrame(() => this.paint());
    },
    paint() {
      if (!this.plan || !this.xs || !this.$refs.cells) return;
      const began = performance.now();
      const { order } = this.plan;
      const look = this.look();
      // Where little has changed, only that is painted.
      if (this.whole || this.stale.size > order.length / 2) {
        const context = sized(this.$refs.cells, this.width, this.height + 2);
        this.heading(context, look);
        this.dress(context);
        for (let at = 0; at < order.length; at++) this.cellAt(context, at, look);
      } else {
        const context = this.$refs.cells.getContext("2d");
        this.dress(context);
        for (const device of this.stale) {
          const at = this.places[device];
          if (at < 0) continue;
          context.clearRect(this.xs[at] - 1, this.ys[at] - 1, this.cell + 2, this.cell + 2);
          this.cellAt(context, at, look);
        }
      }
      this.whole = false;
      this.stale.clear();
      this.legend();
      this.frames += 1;
      this.$el.dataset.painted = this.frames;
      this.$el.dataset.millis = (performance.now() - began).toFixed(1);
      this.$el.dataset.devices = order.length;
    },
    look() {
      const health = this.metric === "health";
      return { health, colors: health ? null : scale(this.metric), unknown: css("--unknown"), text: css("--text"), muted: css("--muted"), alarm: stateColor(6), panel: css("--panel") };
    },
    heading(context, { text, muted }) {
      const { labels, notes } = this.plan;
      const tiny = this.cell < 14 && this.label !== BAND;
      context.textBaseline = "middle";
      this.heads.forEach(([x, y, width], group) => {
        context.textAlign = "left";
        context.font = `500 ${tiny ? 9 : 12}px ${FONT}`;
        context.fillStyle = tiny ? muted : text;
        const name = this.fit(context, labels[group], width);
        context.fillText(name, x, y + (tiny ? 5 : 7));
        if (tiny) return;
        const note = notes[group];
        const taken = context.measureText(name).width + 16;
        context.font = `400 11px ${FONT}`;
        if (context.measureText(note).width + taken >= width) return;
        context.fillStyle = muted;
        if (this.label === BAND) context.fillText(note, x + taken, y + 7.5);
        else {
          context.textAlign = "right";
          context.fillText(note, x + width, y + 7.5);
        }
      });
    },
    dress(context) {
      context.textBaseline = "middle";
      context.textAlign = "center";
      context.font = `500 ${this.cell >= 44 ? 14 : 11}px ${FONT}`;
    },
    cellAt(context, at, { health, colors, unknown, muted, alarm, panel }) {
      const { cell } = this;
      const device = this.plan.order[at];
      const level = health ? this.health[device] : this.levels[device];
      const x = this.xs[at], y = this.ys[at];
      const known = health || level !== UNKNOWN;
      const numbers = cell >= 28;
      context.fillStyle = health ? stateColor(level) : known ? colors[level].css : unknown;
      // Corners that nobody would see cost more than all else.
      if (cell < 14) context.fillRect(x, y, cell, cell);
      else {
        context.beginPath();
        context.roundRect(x, y, cell, cell, cell >= 24 ? 4 : 3);
        context.fill();
      }
      if (health) this.mark(context, x, y, cell, STATES[level]?.mark, numbers ? this.plan.indices[at] : null, panel);
      else {
        if (numbers) {
          context.fillStyle = known ? (colors[level].bright ? "rgba(8,16,24,.82)" : "rgba(255,255,255,.92)") : muted;
          context.fillText(known ? String(this.worth(level)) : "–", x + cell / 2, y + cell / 2 + 0.5);
        }
        if (this.health[device] === 6) {
          context.strokeStyle = alarm;
          context.lineWidth = 2;
          context.strokeRect(x, y, cell, cell);
        }
      }
    },
    mark(context, x, y, cell, mark, index, panel) {
      if (!mark && index === null) return;
      const inset = Math.max(2, cell * 0.28);
      context.lineWidth = Math.max(1.5, cell / 14);
      context.lineCap = "round";
      context.strokeStyle = "rgba(255,255,255,.9)";
      context.beginPath();
      if (mark === "cross") {
        context.moveTo(x + inset, y + inset);
        context.lineTo(x + cell - inset, y + cell - inset);
        context.moveTo(x + cell - inset, y + inset);
        context.lineTo(x + inset, y + cell - inset);
      } else if (mark === "bar") {
        context.moveTo(x + inset, y + cell / 2);
        context.lineTo(x + cell - inset, y + cell / 2);
      } else if (mark === "hollow") {
        context.fillStyle = panel;
        context.roundRect(x + 2, y + 2, cell - 4, cell - 4, 2);
        context.fill();
        return;
      } else if (index !== null) {
        context.fillStyle = "rgba(255,255,255,.82)";
        context.fillText(String(index), x + cell / 2, y + cell / 2 + 0.5);
        return;
      }
      context.stroke();
    },
    worth(level) {
      const [low, high] = RANGES[this.metric];
      return Math.round(low + (level / 250) * (high - low));
    },
    fit(context, name, width) {
      if (context.measureText(name).width <= width) return name;
      let kept = name;
      while (kept.length > 1 && context.measureText("…" + kept).width > width) kept = kept.slice(1);
      return "…" + kept;
    },
    // The colors, and above them how many devices have each.
    legend() {
      if (this.metric === "health") {
        const counts = STATES.map(() => 0);
        this.plan.order.forEach((device) => (counts[this.health[device]] += 1));
        const states = STATES.map(({ name }, at) => ({ name, count: counts[at], color: stateColor(at) }));
        this.states = states.filter(({ count }, at) => count || at === 0 || at === 2);
        return;
      }
      const canvas = this.$refs.scale;
      if (!canvas) return this.$nextTick(() => this.$refs.scale && this.legend());
      const width = 236, bars = 25, height = 40;
      const context = sized(canvas, width, height);
      const counts = new Array(bars).fill(0);
      this.plan.order.forEach((device) => {
        const level = this.levels[device];
        if (level !== UNKNOWN) counts[Math.min(bars - 1, Math.floor((level / 251) * bars))] += 1;
      });
      const most = Math.max(1, ...counts);
      const colors = scale(this.metric);
      counts.forEach((count, at) => {
        const tall = count ? Math.max(2, Math.sqrt(count / most) * 16) : 0;
        const x = (at / bars) * width;
        context.fillStyle = css("--muted");
        context.globalAlpha = 0.55;
        context.fillRect(x, 18 - tall, width / bars - 1, tall);
        context.globalAlpha = 1;
      });
      for (let x = 0; x < width; x++) {
        context.fillStyle = colors[Math.round((x / (width - 1)) * 250)].css;
        context.fillRect(x, 20, 1.5, 6);
      }
      const [low, high, unit] = RANGES[this.metric];
      context.fillStyle = css("--muted");
      context.font = `400 10px ${FONT}`;
      context.textBaseline = "alphabetic";
      [[0, low, "left"], [width / 2, (low + high) / 2, "center"], [width, high, "right"]].forEach(([x, value, align]) => {
        context.textAlign = align;
        context.fillText(`${value}${unit === "%" ? "%" : " " + unit}`, x, 37);
      });
    },
    at(event) {
      const box = this.$refs.cells.getBoundingClientRect();
      const x = event.clientX - box.left, y = event.clientY - box.top;
      const reach = this.cell + GAP;
      for (let n = 0; n < (this.xs?.length ?? 0); n++) {
        if (x >= this.xs[n] && x < this.xs[n] + reach && y >= this.ys[n] && y < this.ys[n] + reach) return n;
      }
      return -1;
    },
    groupOf(at) {
      let before = 0;
      for (let group = 0; group < this.plan.counts.length; group++) {
        before += this.plan.counts[group];
        if (at < before) return group;
      }
      return 0;
    },
    move(event) {
      if (this.plan) this.point(this.at(event));
    },
    point(at) {
      if (at === this.focus) return;
      this.focus = at;
      this.$refs.cells.style.cursor = at >= 0 ? "pointer" : "default";
      this.ring.shown = at >= 0;
      if (at < 0) {
        this.tip.shown = false;
        return;
      }
      const { offsetLeft, offsetTop } = this.$refs.cells;
      const size = `${this.cell + 4}px`;
      this.ring.style = { left: `${offsetLeft + this.xs[at] - 2}px`, top: `${offsetTop + this.ys[at] - 2}px`, width: size, height: size };
      const number = this.plan.order[at];
      this.tip.number = number;
      this.tip.rows = [];
      this.tip.title = `${this.plan.labels[this.groupOf(at)]} · GPU ${this.plan.indices[at]}`;
      this.place(at);
      this.tip.shown = true;
      this.$emit("peek", number);
    },
    place(at) {
      const top = this.$refs.cells.offsetTop;
      const wide = 248;
      let x = this.xs[at] + this.cell + 10;
      if (x + wide > this.width) x = this.xs[at] - wide - 10;
      this.tip.x = Math.max(0, Math.min(x, this.width - wide));
      this.tip.y = top + this.ys[at] + (x < 0 ? this.cell + 8 : -4);
    },
    details(number, title, rows) {
      if (number !== this.tip.number) return;
      this.tip.title = title;
      this.tip.rows = rows;
    },
    leave() {
      this.focus = -1;
      this.tip.shown = this.ring.shown = false;
    },
    choose(event) {
      const at = this.at(event);
      if (at >= 0) this.$emit("open", this.plan.order[at]);
    },
    key(event) {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const total = this.plan?.order.length ?? 0;
      if (!total) return;
      if (step) this.point((Math.max(this.focus, step > 0 ? -1 : 0) + step + total) % total);
      else if (event.key === "ArrowDown" || event.key === "ArrowUp") this.point(this.vertical(event.key === "ArrowDown"));
      else if (event.key === "Enter" && this.focus >= 0) this.$emit("open", this.plan.order[this.focus]);
      else return;
      event.preventDefault();
    },
    vertical(down) {
      const from = Math.max(0, this.focus);
      let best = from, least = Infinity;
      for (let at = 0; at < this.xs.length; at++) {
        const dy = down ? this.ys[at] - this.ys[from] : this.ys[from] - this.ys[at];
        if (dy <= 0) continue;
        const far = dy * 4 + Math.abs(this.xs[at] - this.xs[from]);
        if (far < least) [best, least] = [at, far];
      }
      return best;
    },
  },
};
