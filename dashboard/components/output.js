// What a task prints: text that grows, with a note where a part is missing. Its middle goes once it has grown too long.
const HEAD = 256 * 1024;
const TAIL = 1024 * 1024;

export default {
  template: `
    <div class="output">
      <div class="bar output-bar" role="group" aria-label="Output">
        <button type="button" class="btn small" @click="go(0)">Begin</button>
        <button type="button" class="btn small" @click="go(1)">End</button>
        <button type="button" class="btn small" :class="{on: following}" :aria-pressed="following" title="Stay at the end as it grows" @click="follow">Follow</button>
      </div>
      <pre ref="text" tabindex="0" role="log" aria-live="off" aria-label="Output of the task" @scroll="scrolled"></pre>
    </div>`,
  data() {
    return { following: true };
  },
  created() {
    this.size = 0;
    this.head = 0;
    this.top = 0;
  },
  mounted() {
    this.$emit("ready");
  },
  methods: {
    reset() {
      this.$refs.text.replaceChildren();
      this.size = this.head = 0;
      this.note();
    },
    append(pieces) {
      const { text } = this.$refs;
      for (const [missing, words] of pieces) {
        if (missing) text.append(this.hole(missing));
        const piece = document.createElement("span");
        piece.textContent = words;
        text.append(piece);
        this.size += words.length;
        if (this.size <= HEAD) this.head = text.childNodes.length;
      }
      this.trim();
      if (this.following) text.scrollTop = text.scrollHeight;
      this.note();
    },
    hole(words) {
      const made = document.createElement("div");
      made.className = "output-hole";
      made.textContent = words;
      return made;
    },
    // Removes the oldest pieces behind the head, and says so in one note.
    trim() {
      const { text } = this.$refs;
      if (this.size <= HEAD + TAIL) return;
      let next = text.childNodes[this.head];
      if (next?.className === "output-hole" && next.dataset.cut) next = next.nextSibling;
      else {
        const cut = this.hole("A part is no longer shown here.");
        cut.dataset.cut = "1";
        text.insertBefore(cut, next ?? null);
      }
      while (this.size > HEAD + TAIL && next && next !== text.lastChild) {
        const after = next.nextSibling;
        if (next.className !== "output-hole") this.size -= next.textContent.length;
        next.remove();
        next = after;
      }
    },
    go(end) {
      const { text } = this.$refs;
      this.following = end === 1;
      text.scrollTop = end ? text.scrollHeight : 0;
      text.focus({ preventScroll: true });
    },
    follow() {
      this.following = !this.following;
      if (this.following) this.$refs.text.scrollTop = this.$refs.text.scrollHeight;
    },
    // Whoever scrolls up reads: the text stays where it is then.
    scrolled() {
      const { text } = this.$refs;
      if (text.scrollTop < this.top - 1 && text.scrollTop + text.clientHeight < text.scrollHeight - 40) this.following = false;
      this.top = text.scrollTop;
    },
    note() {
      this.$el.dataset.characters = this.size;
    },
  },
};
