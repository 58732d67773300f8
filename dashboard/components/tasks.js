// A cell a task, on one canvas: only the rows in view are drawn, so that 100,000 of them cost no more than a thousand.
import { bytes, css, drawn, sized, uint32 } from "corral-ui";

const MOST = 20;
const LEAST = 4;
const TALLEST = 420;
const MARKS = { failed: "cross", cancelled: "bar", preempted: "bar", lost: "hollow" };

export default {
  mixins: [drawn],
  template: `
    <div class="tasks" @mouseleave="leave">
      <div class="heat-legend" role="group" aria-label="Tasks by state">
        <button v-for="state in states" type="button" class="heat-key link" :data-state="state.name" :title="'Select the next one that is ' + state.name" @click="next(state.code)">
          <i :class="'job-' + state.name"></i>{{ state.name }} <b>{{ state.count.toLocaleString("en") }}</b></button>
      </div>
      <div ref="box" class="tasks-box" @scroll="draw">
        <div :style="{height: height + 'px', position: 'relative'}">
          <canvas ref="cells" class="tasks-cells" tabindex="0" role="application" :aria-label="label"
            @mousemove="move" @click="choose" @keydown="key" @blur="leave"></canvas>
        </div>
      </div>
      <div class="tasks-tip note" role="status">{{ tip }}&nbsp;</div>
    </div>`,
  data() {
    return { height: 40, states: [], tip: "", label: "Tasks" };
  },
  created() {
    // Not reactive: Vue need not look at thousands of numbers.
    this.codes = new Uint8Array();
    this.names = [];
    this.run = null;
    this.indexes = null;
    this.selected = -1;
    this.focus = -1;
  },
  beforeUnmount() {
    cancelAnimationFrame(this.frame);
  },
  methods: {
    resized() {
      this.arrange();
    },
    show(names, run, indexes, codes, selected) {
      this.names = names;
      this.run = run;
      this.indexes = run ? null : uint32(indexes);
      this.codes = bytes(codes);
      this.selected = selected;
      this.arrange();
    },
    change(update) {
      if (update.full) this.codes = bytes(update.full);
      else {
        const at = uint32(update.at), to = bytes(update.to);
        for (let n = 0; n < at.length; n++) this.codes[at[n]] = to[n];
      }
      this.draw();
    },
    select(position) {
      this.selected = position;
      if (position >= 0) this.reveal(position);
      this.draw();
    },
    indexOf(at) {
      return this.run ? this.run[0] + at * this.run[1] : this.indexes[at];
    },
    // The largest cells with which all tasks are in view; small ones scroll.
    arrange() {
      const width = this.$refs.box?.clientWidth;
      const total = this.codes.length;
      if (!width || !total) return;
      for (this.pitch = MOST; this.pitch > LEAST; this.pitch--) {
        this.columns = Math.max(1, Math.floor(width / this.pitch));
        if (Math.ceil(total / this.columns) * this.pitch <= TALLEST) break;
      }
      this.columns = Math.max(1, Math.floor(width / this.pitch));
      this.height = Math.ceil(total / this.columns) * this.pitch + 2;
      this.$refs.box.style.height = `${Math.min(this.height, TALLEST + 2)}px`;
      this.label = `${total} tasks by state. Arrow keys move, Enter selects.`;
      this.$nextTick(() => {
        if (this.selected >= 0) this.reveal(this.selected);
        this.draw();
      });
    },
    draw() {
      cancelAnimationFrame(this.frame);
      this.frame = requestAnimationFrame(() => this.paint());
    },
    paint() {
      const { box, cells } = this.$refs;
      if (!box || !this.pitch) return;
      const began = performance.now();
      const { pitch, columns, codes } = this;
      const top = box.scrollTop, view = box.clientHeight;
      const context = sized(cells, columns * pitch, view);
      const first = Math.floor(top / pitch) * columns, last = Math.min(codes.length, Math.ceil((top + view) / pitch) * columns);
      const size = pitch - (pitch >= 6 ? 2 : 1);
      const text = css("--text"), panel = css("--panel");
      const colors = this.names.map((name) => css(`--job-${name}`));
      const marks = this.names.map((name) => (size >= 8 ? MARKS[name] : null));
      for (let at = first; at < last; at++) {
        const x = (at % columns) * pitch + 1, y = Math.floor(at / columns) * pitch - top + 1;
        context.fillStyle = colors[codes[at]];
        context.fillRect(x, y, size, size);
        if (marks[codes[at]]) this.mark(context, x, y, size, marks[codes[at]], panel);
      }
      for (const [at, wide] of [[this.selected, 2], [this.focus, 1]]) {
        if (at < first || at >= last) continue;
        context.strokeStyle = text;
        context.lineWidth = wide;
        context.strokeRect((at % columns) * pitch + 0.5, Math.floor(at / columns) * pitch - top + 0.5, size + 1, size + 1);
      }
      this.legend();
      this.$el.dataset.tasks = codes.length;
      this.$el.dataset.selected = this.selected >= 0 ? this.indexOf(this.selected) : "";
      this.$el.dataset.millis = (performance.now() - began).toFixed(1);
    },
    mark(context, x, y, size, mark, panel) {
      const inset = Math.max(2, size * 0.25);
      context.lineWidth = 1.5;
      context.strokeStyle = panel;
      context.beginPath();
      if (mark === "hollow") {
        context.fillStyle = panel;
        context.fillRect(x + inset, y + inset, size - 2 * inset, size - 2 * inset);
        return;
      }
      if (mark === "cross") {
        context.moveTo(x + inset, y + inset);
        context.lineTo(x + size - inset, y + size - inset);
        context.moveTo(x + size - inset, y + inset);
        context.lineTo(x + inset, y + size - inset);
      } else {
        context.moveTo(x + inset, y + size / 2);
        context.lineTo(x + size - inset, y + size / 2);
      }
      context.stroke();
    },
    legend() {
      const counts = new Array(this.names.length).fill(0);
      for (const code of this.codes) counts[code] += 1;
      const states = this.names.map((name, code) => ({ name, code, count: counts[code] })).filter(({ count }) => count);
      if (JSON.stringify(states) !== JSON.stringify(this.states)) this.states = states;
    },
    reveal(at) {
      const { box } = this.$refs;
      const y = Math.floor(at / this.columns) * this.pitch;
      if (y < box.scrollTop || y + this.pitch > box.scrollTop + box.clientHeight) box.scrollTop = y - box.clientHeight / 2;
    },
    at(event) {
      const rect = this.$refs.cells.getBoundingClientRect();
      const column = Math.floor((event.clientX - rect.left) / this.pitch);
      const row = Math.floor((event.clientY - rect.top + this.$refs.box.scrollTop) / this.pitch);
      const at = row * this.columns + column;
      return column >= 0 && column < this.columns && at < this.codes.length ? at : -1;
    },
    move(event) {
      this.point(this.at(event));
    },
    point(at) {
      if (at === this.focus) return;
      this.focus = at;
      this.tip = at < 0 ? "" : `Task ${this.indexOf(at)}: ${this.names[this.codes[at]]}`;
      this.draw();
    },
    leave() {
      this.point(-1);
    },
    choose(event) {
      const at = this.at(event);
      if (at >= 0) this.$emit("open", at);
    },
    next(code) {
      for (let n = 1; n <= this.codes.length; n++) {
        const at = (Math.max(this.selected, -1) + n) % this.codes.length;
        if (this.codes[at] === code) return this.$emit("open", at);
      }
    },
    key(event) {
      const total = this.codes.length;
      const from = this.focus >= 0 ? this.focus : Math.max(0, this.selected);
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns }[event.key];
      if (!total) return;
      if (event.key === "Enter") this.$emit("open", from);
      else {
        const to = event.key === "Home" ? 0 : event.key === "End" ? total - 1 : step ? Math.min(total - 1, Math.max(0, from + step)) : null;
        if (to === null) return;
        this.reveal(to);
        this.point(to);
      }
      event.preventDefault();
    },
  },
};
