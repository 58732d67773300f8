"""Fit page: a form about a model to serve, whether the free GPUs hold it, the split drawn over them, and commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from nicegui import ui
from nicegui.element import Element
from starlette.requests import Request

from ...client import CorralError, InvalidRequest
from ...client.measured.find import Measured, with_measured_rates
from ...client.model_files.known import known_models
from ...client.notebook import short_model
from ...schemas.models.serving import ServeFit
from ..components import fit_answer
from ..components.fit_split import split
from ..fit_form import (
    CONFIG,
    CONFIG_CHARACTERS,
    FIELDS,
    FIRST_MODEL,
    KNOWN,
    MORE,
    NUMBERS,
    PROFILE_CHARACTERS,
    Question,
    kept_in_url,
    question_of,
)
from ..fleet import problem_of
from ..html import Segments, initial_text, on_choice, on_typing, remember, tag
from ..page_frame import Frame, Notice

_SOURCES: Final = ((KNOWN, "Well-known"), (NUMBERS, "By numbers"), (CONFIG, "config.json"))
_FORMATS: Final = ("bf16", "fp16", "fp8", "int8", "int4", "q8_0", "q6_k", "q5_k", "q4_k")
_LABELS: Final = {
    "config": "config.json", "params": "Parameters", "layers": "Layers", "hidden": "Hidden size",
    "heads": "Attention heads", "kv_heads": "Heads of keys and values", "context": "Context",
    "sequences": "Sequences at once", "prompt": "Prompt", "network": "Network",
    "memory_share": "Part of free memory to use", "max_token_time": "Longest time per token",
    "max_first_token_time": "Longest time to the first token", "profile": "Profile",
}  # fmt: skip
_PROFILE: Final = '[[rate]]\ndevice = "*H100*"\nmemory_bytes_per_second = 2.4e12'
_READ_FILE: Final = (
    "(event) => { const file = event.target.files[0]; if (!file) return;"
    " const area = event.target.closest('form').querySelector('textarea');"
    f" file.slice(0, {CONFIG_CHARACTERS + 1}).text().then((text) => {{"
    " area.value = text; area.dispatchEvent(new Event('input', {bubbles: true})); }); }"
)
"""Puts the text of the chosen file into the text field, as if it had been pasted."""


def register(frame: Callable[[Request, str], Frame]) -> None:
    """Register the page."""

    @ui.page("/fit")
    async def page(request: Request) -> None:
        around = frame(request, "Fit")
        await around.fleet.ready()
        given = {name: request.query_params[name] for name in FIELDS if name in request.query_params}
        limits = {"config": CONFIG_CHARACTERS, "profile": PROFILE_CHARACTERS}
        with around.show("/fit"):
            FitPage(around, {name: text[: limits.get(name, 256)] for name, text in given.items()})


class FitPage:
    """The fit page in one browser."""

    def __init__(self, frame: Frame, form: dict[str, str]) -> None:
        self.frame = frame
        self.form = form
        self._asked = 0
        self._question: Question | None = None
        self._found: ServeFit | None = None
        self._sources: dict[str, Element] = {}
        with tag("div", "head"), tag("div"):
            tag("h1", text="Fit a model")
            tag(
                "div",
                "sub",
                "Whether the free GPUs can serve a model, how to split it, and how fast. Nothing is leased.",
            )
        self._notice = Notice()
        with tag("div", "split"):
            with tag("section", "panel"):
                self._form()
            with tag("section", "panel"):
                with tag("div", "panel-head"):
                    tag("h2", text="Answer")
                self._answer = tag("div")
                with self._answer:
                    tag("div", "note", "Describe a model, and press Fit.")
        self._plans = tag("section", "panel")
        self._split = tag("section", "panel")
        self._commands = tag("section", "panel")
        self._clear()
        frame.on_refresh(lambda: self._notice.tell(frame.fleet.problem))
        if form:
            ui.timer(0, self._ask, once=True)

    # Form

    def _form(self) -> None:
        source = self.form.get("source", KNOWN)
        with tag("form", "form", autocomplete="off") as form:
            # Enter does the same as the button; the browser doesn't submit the form itself.
            form.on("submit.prevent", self._ask, [])
            with tag("div", "wide"):
                Segments(_SOURCES, source, self._source, "Description of the model")
            self._described()
            self._show_source(source)
            self._field("dtype", "Weights as", "as in its files", list="formats")
            with tag("datalist", id="formats"):
                for name in _FORMATS:
                    tag("option", value=name)
            self._field("context", "Context, in tokens", "4096", type="number", min=1)
            self._field("sequences", "Sequences at once", "1", type="number", min=1)
            self._field("models", "GPU models", "any", list="models")
            with tag("datalist", id="models"):
                for model in sorted({short_model(device.model) for device in self.frame.fleet.devices}):
                    tag("option", value=f"*{model}*")
            self._more()
            with tag("div", "bar wide"), tag("button", "btn primary", type="submit"):
                tag("span", text="Fit")

    def _described(self) -> None:
        with tag("div", "wide") as self._sources[KNOWN]:
            names = [(name, name) for name in known_models()]
            self._choice("known", "Model", names, self.form.get("known", FIRST_MODEL))
        with tag("div", "wide") as self._sources[NUMBERS], tag("div", "form"):
            self._field("params", "Parameters", "70B")
            self._field("layers", "Layers", "80", type="number", min=1)
            self._field("hidden", "Hidden size", "estimated; 8192", type="number", min=1)
            self._field("heads", "Attention heads", "estimated; 64", type="number", min=1)
            self._field("kv_heads", "Heads of keys and values", "as many as heads; 8", type="number", min=1)
        with tag("div", "wide") as self._sources[CONFIG], tag("div", "form"):
            example = '{"architectures": ["LlamaForCausalLM"], …}'
            self._text("config", "Text of its config.json", example, CONFIG_CHARACTERS)
            with tag("label", "wide"):
                tag("span", text="or the file; its text alone is sent")
                tag("input", "", type="file", accept=".json,application/json").on("change", js_handler=_READ_FILE)

    def _more(self) -> None:
        with tag("details", "wide") as more:
            if any(self.form.get(name) for name in MORE):
                more.props["open"] = True
            tag("summary", "note link", "More")
            with tag("div", "form").style("margin-top:14px"):
                self._field("kv_dtype", "KV cache as", "as plain weights; fp8")
                self._field("prompt", "Prompt, in tokens", "half of the context", type="number", min=1)
                self._field("max_token_time", "Longest time per token", "any; 50ms")
                self._field("max_first_token_time", "Longest time to the first token", "any; 2s")
                self._field("hosts", "Hosts", "any; node-0*, node-1*")
                self._field("network", "Between hosts, in Gbit/s", "10", type="number", min=0.001, step="any")
                self._field("memory_share", "Part of the free memory to use", "0.9", type="number", min=0.1, max=1,
                            step="any")  # fmt: skip
                choices = [("", "if they are alike"), ("no", "no")]
                chosen = self.form.get("tensor_parallel", "")
                self._choice("tensor_parallel", "GPUs of a host as one", choices, chosen)
                choices = [("", "of your jobs, and tables"), ("no", "of the profile only")]
                self._choice("measured", "Measured rates", choices, self.form.get("measured", ""))
                self._field("path", "Name or path in the commands", "its name on Hugging Face", "wide")
                self._text("profile", "Profile of measured rates", _PROFILE, PROFILE_CHARACTERS)

    def _field(self, name: str, label: str, placeholder: str, classes: str = "", **attributes: Any) -> None:
        with tag("label", classes):
            tag("span", text=label)
            field = tag("input", "field", name=name, placeholder=placeholder, maxlength=256,
                        **initial_text(self.form.get(name, "")), **attributes)  # fmt: skip
        on_typing(field, lambda text: self._typed(name, text[:256]), pause=0.1)

    def _text(self, name: str, label: str, placeholder: str, characters: int) -> None:
        with tag("label", "wide"):
            tag("span", text=label)
            area = tag("textarea", "field", name=name, spellcheck="false", maxlength=characters,
                       placeholder=placeholder, **initial_text(self.form.get(name, "")))  # fmt: skip
        on_typing(area, lambda text: self._typed(name, text[: characters + 1]))

    def _choice(self, name: str, label: str, choices: list[tuple[str, str]], chosen: str) -> None:
        with tag("label"):
            tag("span", text=label)
            with tag("select", "field", name=name) as field:
                for value, words in choices:
                    tag("option", "", words, value=value, selected=value == chosen or None)
        on_choice(field, lambda value: self._typed(name, value[:256]))

    def _typed(self, name: str, text: str) -> None:
        self.form[name] = text
        self.form.pop("plan", None)
        remember("/fit", **kept_in_url(self.form))

    def _source(self, source: str) -> None:
        self._show_source(source)
        self._typed("source", source)

    def _show_source(self, source: str) -> None:
        for name, place in self._sources.items():
            place.set_visibility(name == source)

    # Answer

    async def _ask(self) -> None:
        self._asked += 1
        asked = self._asked
        try:
            question = question_of(self.form)
            fields = question.fields
            fields["owner"] = self.frame.session.name
            self._show(lambda: _planning(), keep=True)
            owner = fields["owner"]
            asked_for = Measured(question.work)
            if question.measured:
                asked_for = await self.frame.ask(lambda client: with_measured_rates(client, question.work, owner))
            question = question._replace(work=asked_for.work)
            found = await self.frame.ask(lambda client: client.fit_work(question.work, **fields))
        except InvalidRequest as error:
            wrong = error
            self._latest(asked, lambda: _wrong(wrong))
        except CorralError as error:
            problem = problem_of(error, self.frame.fleet.url)
            self._latest(asked, lambda: Notice().tell(problem, whole=True))
        else:
            if asked == self._asked:
                self._question, self._found = question, found
                self._show(lambda: fit_answer.verdict(question.work, found, asked_for.problem))
                if found.plans:
                    self._choose(self._number())

    def _latest(self, asked: int, show: Callable[[], None]) -> None:
        if asked == self._asked:
            self._show(show)

    def _show(self, show: Callable[[], None], keep: bool = False) -> None:
        """Show an answer; without `keep` the plans of an earlier one go."""
        if not keep:
            self._clear()
        self._answer.clear()
        with self._answer:
            show()

    def _clear(self) -> None:
        for place in (self._plans, self._split, self._commands):
            place.clear()
            place.set_visibility(False)

    def _number(self) -> int:
        text = self.form.get("plan", "")
        return int(text) if text.isdecimal() and len(text) < 4 else 1

    def _choose(self, number: int) -> None:
        question, found = self._question, self._found
        if question is None or found is None or not found.plans:
            return
        number = min(max(1, number), len(found.plans))
        plan = found.plans[number - 1]
        self.form["plan"] = str(number) if number > 1 else ""
        remember("/fit", **kept_in_url(self.form))
        self._clear()
        self._part(self._plans, "Plans", lambda: fit_answer.plans(found.plans, number, self._choose))
        self._part(self._split, f"Plan {number}", lambda: (split(plan), fit_answer.rests_on(plan)))
        self._part(
            self._commands, "Commands that start it", lambda: fit_answer.commands(plan, question.work, question.path)
        )

    def _part(self, place: Element, title: str, show: Callable[[], Any]) -> None:
        place.set_visibility(True)
        with place:
            with tag("div", "panel-head"):
                tag("h2", text=title)
            show()


def _planning() -> None:
    with tag("div", "verdict", role="status"):
        ui.icon("hourglass_empty")
        tag("span", text="Planning…")


def _wrong(error: InvalidRequest) -> None:
    field = error.field.removeprefix("$.")
    with tag("div", "verdict fit-wrong", role="alert"):
        ui.icon("edit")
        tag("span", text=f"{_LABELS.get(field, field)}: {error}" if field else str(error))
