// Statements that this browser has run, and those that its user has saved by name. They are kept in the browser alone.
import { copyText, stamp } from "corral-ui";

const RECENT = 40;
const SAVED = 200;

function read(key) {
  try {
    const found = JSON.parse(localStorage.getItem(key) ?? "{}");
    const those = (list) => (Array.isArray(list) ? list.filter((one) => typeof one?.sql === "string") : []);
    return { recent: those(found.recent), saved: those(found.saved) };
  } catch {
    return { recent: [], saved: [] };
  }
}

export default {
  props: { owner: String },
  template: `
    <div class="sql-history">
      <form class="bar" v-if="sql" @submit.prevent="save">
        <input class="field" v-model="name" maxlength="80" placeholder="Save this statement as…" aria-label="Name of the saved question">
        <button class="btn small" type="submit" :disabled="!name.trim()">Save</button>
        <button class="btn small" type="button" @click="copy(sql, 'sql')">{{ copied === 'sql' ? 'Copied' : 'Copy SQL' }}</button>
        <button class="btn small" type="button" @click="copy(link(sql), 'link')">{{ copied === 'link' ? 'Copied' : 'Copy link' }}</button>
        <span class="note" role="status">{{ told }}</span>
      </form>
      <details v-if="saved.length" open><summary class="note link">Saved questions, {{ saved.length }}</summary>
        <div class="sql-line" v-for="(one, at) in saved" :key="one.name">
          <a :href="link(one.sql)" :title="one.sql">{{ one.name }}</a>
          <button class="btn small quiet" type="button" @click="copy(link(one.sql), one.name)">{{ copied === one.name ? 'Copied' : 'Copy link' }}</button>
          <button class="btn small quiet" type="button" :aria-label="'Delete ' + one.name" @click="drop(at)">Delete</button>
        </div>
      </details>
      <details v-if="recent.length"><summary class="note link">Recent statements, {{ recent.length }}</summary>
        <div class="sql-line" v-for="one in recent" :key="one.at">
          <a class="mono" :href="link(one.sql)" :title="one.sql">{{ one.sql.replace(/\\s+/g, " ") }}</a>
          <span class="note">{{ when(one.at) }}</span>
        </div>
        <button class="btn small quiet" type="button" @click="forget">Clear the recent statements</button>
      </details>
    </div>`,
  data() {
    return { sql: "", name: "", told: "", copied: "", recent: [], saved: [] };
  },
  created() {
    this.key = `corral_sql:${this.owner}`;
    this.load();
    // Another tab of the same browser may have changed them.
    this.elsewhere = (event) => event.key === this.key && this.load();
    window.addEventListener("storage", this.elsewhere);
  },
  mounted() {
    this.$emit("ready");
  },
  beforeUnmount() {
    window.removeEventListener("storage", this.elsewhere);
  },
  methods: {
    load() {
      Object.assign(this, read(this.key));
    },
    store() {
      try {
        localStorage.setItem(this.key, JSON.stringify({ recent: this.recent, saved: this.saved }));
        this.told = "";
      } catch {
        this.told = "This browser keeps nothing for the page.";
      }
    },
    add(sql) {
      this.load();
      this.sql = sql;
      this.recent = [{ sql, at: Date.now() }, ...this.recent.filter((one) => one.sql !== sql)].slice(0, RECENT);
      this.store();
    },
    save() {
      const name = this.name.trim();
      this.load();
      this.saved = [{ name, sql: this.sql }, ...this.saved.filter((one) => one.name !== name)].slice(0, SAVED);
      this.store();
      this.name = "";
    },
    drop(at) {
      this.saved.splice(at, 1);
      this.store();
    },
    forget() {
      this.recent = [];
      this.store();
    },
    link(sql) {
      return `${location.origin}/analytics?sql=${encodeURIComponent(sql)}`;
    },
    when(at) {
      return stamp(at, 16);
    },
    async copy(text, what) {
      this.copied = (await copyText(text)) ? what : "";
      this.told = this.copied ? "" : "This browser doesn't let pages copy.";
    },
  },
};
