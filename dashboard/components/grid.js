// A result as a table: sorted by a click on a head, numbers as people read them.
import { format } from "corral-ui";

const MOST = 1000;
const SUFFIXES = [["_bytes", "bytes"], ["_percent", "percent"], ["_celsius", "celsius"], ["_watts", "watts"]];

function unitOf(name) {
  const plain = name.replace(/_(mean|min|max|p95|last|peak)$/, "");
  return SUFFIXES.find(([suffix]) => plain.endsWith(suffix))?.[1] ?? "";
}

export default {
  template: `
    <div class="table-wrap" style="max-height:520px;overflow:auto">
      <table class="rows">
        <thead><tr>
          <th v-for="(column, at) in columns" :class="{num: column.numeric}" :title="column.help" :aria-sort="by === at ? (down ? 'descending' : 'ascending') : 'none'"
            style="cursor:pointer;position:sticky;top:0;background:var(--panel);z-index:1" tabindex="0" @click="sort(at)" @keydown.enter="sort(at)">
            {{ column.name }}{{ by === at ? (down ? " ↓" : " ↑") : "" }}</th>
        </tr></thead>
        <tbody>
          <tr v-for="row in sorted"><td v-for="(cell, at) in row" :class="{num: columns[at].numeric}"><div class="clip" :class="{num: columns[at].numeric}" :title="typeof cell === 'string' ? cell : null">{{ show(cell, at) }}</div></td></tr>
        </tbody>
      </table>
    </div>`,
  data() {
    return { columns: [], rows: [], by: -1, down: false };
  },
  mounted() {
    this.$emit("ready");
  },
  computed: {
    sorted() {
      const rows = this.rows.slice();
      if (this.by >= 0) {
        const sign = this.down ? -1 : 1;
        rows.sort((one, other) => {
          const a = one[this.by], b = other[this.by];
          if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
          return sign * (a < b ? -1 : a > b ? 1 : 0);
        });
      }
      return rows.slice(0, MOST);
    },
  },
  methods: {
    fill(columns, rows) {
      this.columns = columns.map((column) => ({ ...column, unit: unitOf(column.name) }));
      this.rows = rows;
      this.by = -1;
      this.$el.dataset.rows = rows.length;
    },
    sort(at) {
      this.down = this.by === at ? !this.down : this.columns[at].numeric;
      this.by = at;
    },
    show(cell, at) {
      if (cell === null) return "–";
      return typeof cell === "number" ? format(cell, this.columns[at].unit) : String(cell);
    },
  },
};
