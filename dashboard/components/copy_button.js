// A button that copies a text, and says that it did.
import { copyText } from "corral-ui";

export default {
  props: { text: String, label: String },
  template: `<button class="btn small copy" type="button" :title="'Copy ' + text" @click="copy">{{ told || label }}</button>`,
  data() {
    return { told: "" };
  },
  methods: {
    async copy() {
      this.told = (await copyText(this.text)) ? "Copied" : "Can't copy";
      setTimeout(() => (this.told = ""), 2000);
    },
  },
};
