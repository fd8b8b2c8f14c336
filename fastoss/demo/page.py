"""The demo's page: Gradio's controls around our own drawing of the conversation. It asks talk.py, draws with view.py, and holds no model code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from fastoss.demo.models import Models
from fastoss.demo.sessions import Sessions
from fastoss.demo.talk import AS_USER, Asking, Mode, Spoken, Talk, Turn
from fastoss.demo.view import history_html, live_html, preferences_html
from fastoss.demo.votes import VoteFile, liked_row, longest_row, pair_row, thumb_pairs, write_dpo_recipe
from fastoss.errors import FastossError
from fastoss.inference.sampling import Effort, ReasoningLanguage

_AS_TRAINED = "as trained"
_EXAMPLES = 4


@dataclass(frozen=True)
class Shown:
    """What the page offers. `reasoning`: visitors may look at it; `picker`: they may load another run; `sign_out`: they signed in."""

    reasoning: bool = True
    picker: bool = True
    sign_out: bool = False


class Demo:
    """What the page's controls do. Each method takes and returns the controls' values in the order in which `build` wires them."""

    def __init__(self, models: Models, pairs: VoteFile, liked: VoteFile, shown: Shown, log: Callable[[Turn], None]):
        self.models, self.pairs, self.liked, self.shown, self.log = models, pairs, liked, shown, log
        self.limits, self.sessions = models.limits, Sessions(models.limits)

    # -- asking

    def ask(self, text: str, *settings: Any, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Question and settings → pictures of the page while the answer comes."""
        yield from self._asked(self._talk(request), settings, lambda: (text, []))

    def retry(self, *settings: Any, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """The last question again, with the settings as they are now; its earlier answers are remembered for votes."""
        talk = self._talk(request)

        def last() -> tuple[str, list[Spoken]]:
            turn = talk.take_back()
            if turn is None:
                raise FastossError("there is nothing to ask again")
            return turn.text, turn.all_replies()

        yield from self._asked(talk, settings, last)

    def _asked(self, talk: Talk, settings: Sequence[Any], question: Callable[[], tuple[str, list[Spoken]]]) -> Iterator[tuple[Any, ...]]:
        """Ask the `question` (its text, and earlier replies to it), which is taken only when the settings are sound."""
        try:
            asking = asking_of(*settings)
            text, before = question()
        except FastossError as problem:
            yield self._picture(talk, note=_words(problem))
            return
        turns = len(talk.turns)
        asked = False
        try:
            with self.models.using() as engine:
                for number, _ in enumerate(talk.ask(engine, text, asking, self.limits, before)):
                    asked = True
                    yield self._picture(talk, live=True, whole=number == 0)
        except FastossError as problem:
            if not asked:  # the question stays in the box
                del talk.turns[turns:]
                yield self._picture(talk, box=text, note=_words(problem))
                return
            talk.turns[-1].replies[-1].state, talk.turns[-1].replies[-1].fault = "failed", problem.fact
        if len(talk.turns) > turns:  # else a new chat was begun meanwhile
            self.log(talk.turns[-1])
        yield self._picture(talk)

    def stop(self, request: gr.Request) -> None:
        self._talk(request).stop()

    def edit(self, request: gr.Request) -> tuple[Any, ...]:
        """The last question goes back into the box."""
        talk = self._talk(request)
        turn = talk.take_back()
        return self._picture(talk, box=turn.text if turn else None)

    def new(self, request: gr.Request) -> tuple[Any, ...]:
        talk = self._talk(request)
        talk.stop()
        with talk.free(seconds=10):
            talk.turns.clear()
        return self._picture(talk)

    def end(self, request: gr.Request) -> None:
        self.sessions.end(request.session_hash)

    # -- votes

    def prefer(self, place: int, request: gr.Request) -> tuple[Any, ...]:
        """One of two answers is the better one: a row for DPO."""
        talk = self._talk(request)
        if not talk.turns or talk.busy or len(talk.turns[-1].replies) != 2:
            return self._nothing()
        turn = talk.turns[-1]
        left, right = turn.replies
        chosen, rejected = (left, right) if place == 0 else (right, left)
        try:
            row = pair_row(turn, chosen, rejected, longest_row(self.models.about.run))
            if turn.preferred is not None and turn.preferred != place:
                self.pairs.remove(pair_row(turn, rejected, chosen))
            if turn.preferred != place:
                self.pairs.add(row)
                self._recipe()
        except FastossError as problem:
            return self._picture(talk, note=_words(problem))
        turn.preferred = place
        return self._picture(
            talk, note=f"Kept as preference {len(self.pairs.rows())} in {self.pairs.path.name}. The chat continues from this answer."
        )

    def like(self, vote: str, request: gr.Request) -> tuple[Any, ...]:
        """A thumb: up keeps the answer as a row for SFT; together with a thumb the other way on another try it makes a pair."""
        talk = self._talk(request)
        if not talk.turns or talk.busy or len(talk.turns[-1].replies) != 1:
            return self._nothing()
        turn, reply = talk.turns[-1], talk.turns[-1].replies[0]
        if reply.vote == vote or not reply.content:
            return self._picture(talk, note="There is no answer to vote on." if not reply.content else None)
        changed, reply.vote = reply.vote, vote
        try:
            if vote == "up":
                self.liked.add(liked_row(turn, reply))
            elif changed == "up":
                self.liked.remove(liked_row(turn, reply))
            for row in thumb_pairs(turn, reply, changed):
                self.pairs.remove(row)
            made = thumb_pairs(turn, reply, vote, longest_row(self.models.about.run))
            for row in made:
                self.pairs.add(row)
                self._recipe()
        except FastossError as problem:
            return self._picture(talk, note=_words(problem))
        if made:
            note = f"Kept as a preference in {self.pairs.path.name}: this try against the one before."
        elif vote == "up":
            note = f"Kept in {self.liked.path.name}."
        else:
            note = "Noted. Retry, and like the better answer: the two become a preference."
        return self._picture(talk, note=note)

    # -- the rest of the page

    def export(self, kind: str, request: gr.Request) -> str:
        """The conversation for the browser to save, in an element that demo.js reads. `kind`: row (JSONL, trainable) or text."""
        talk = self._talk(request)
        turns = [turn for turn in talk.turns if turn.kept.content]
        if not turns:
            raise gr.Error("There is no conversation to save yet.", print_exception=False)
        if kind == "row":
            first = turns[-1].asked[0]
            messages = [{"role": "system", "content": first.content}] if first.role == "system" else []
            for turn in turns:
                thinking = {"thinking": turn.kept.thinking} if turn.kept.thinking and self.shown.reasoning else {}
                messages += [{"role": "user", "content": turn.text}, {"role": "assistant", "content": turn.kept.content} | thinking]
            name, text = "conversation.jsonl", json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        else:
            name = "conversation.md"
            parts = [f"**You:** {turn.text}\n\n**{turn.kept.label} ({self.models.about.name}):** {turn.kept.content}\n" for turn in turns]
            text = f"# A conversation with {self.models.about.name}\n\n" + "\n".join(parts)
        packed = json.dumps({"name": name, "text": text})
        return "<pre>" + packed.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e") + "</pre>"

    def change(self, name: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Load another run, for everybody."""
        talk = self._talk(request)
        yield self._picture(talk, note=f"Loading {name}; this takes as long as it took at the start.")
        try:
            self.models.change(name)
        except FastossError as problem:
            yield self._picture(talk, note=_words(problem))
            return
        yield self._picture(talk, note=f"{name} answers now.")

    def heading(self) -> str:
        about = self.models.about
        out = '<button type="button" class="sign-out">Sign out</button>' if self.shown.sign_out else ""
        theme = '<button type="button" class="theme" title="Light or dark">◐</button>'
        return (
            f'<header class="head"><div><h1>{escape(about.name)}</h1><p>{escape(about.line)}</p></div><div class="corner">{out}{theme}</div></header>'
        )

    def preferences(self) -> str:
        pairs = self.pairs.rows()
        return preferences_html(pairs, len(self.liked.rows()), self.pairs.path, self._recipe() if pairs else None)

    def _recipe(self) -> Path | None:
        """The recipe that trains on the pairs, written beside them where the model is a run."""
        run = self.models.about.run
        return write_dpo_recipe(run, self.models.name, self.pairs.path) if run is not None else None

    def _talk(self, request: gr.Request) -> Talk:
        return self.sessions.of(request.session_hash)

    def _picture(self, talk: Talk, *, live: bool = False, whole: bool = True, box: str | None = None, note: str | None = None) -> tuple[Any, ...]:
        """Values for all of the page's changing parts; while an answer comes (`live`, not `whole`) only that is drawn again."""
        if live and not whole:
            return (gr.skip(), live_html(talk, reasoning=self.shown.reasoning), *(gr.skip(),) * (len(PARTS) - 2))
        turn = talk.turns[-1] if talk.turns else None
        over = turn is not None and not live
        answered = [reply.content for reply in turn.replies] if turn and over else []
        two = len(answered) == 2
        return (
            history_html(talk, reasoning=self.shown.reasoning, live=True),
            live_html(talk, reasoning=self.shown.reasoning),
            gr.update(value="" if live else box) if live or box is not None else gr.skip(),
            gr.update(visible=not live),
            gr.update(visible=live),
            gr.update(visible=over),
            gr.update(visible=over and two and all(answered) and answered[0] != answered[1]),
            gr.update(visible=over and len(answered) == 1 and bool(answered[0])),
            gr.update(visible=turn is None),
            f'<p class="note" role="status">{escape(note)}</p>' if note else "",
        )

    def _nothing(self) -> tuple[Any, ...]:
        return tuple(gr.skip() for _ in PARTS)


# What `_picture` fills, in this order.
PARTS = ("history", "live", "box", "send", "stop", "actions", "preferring", "liking", "examples", "note")


def build(demo: Demo) -> gr.Blocks:
    """Lay the controls out and wire them to `demo`."""
    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    free = private | {"concurrency_limit": None}
    has_adapter = bool(getattr(demo.models.engine, "has_adapter", False))
    with gr.Blocks(title=f"{demo.models.about.name} · fastoss demo", analytics_enabled=False, fill_width=True) as page:
        heading = _html(demo.heading(), "heading")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat"), gr.Row(elem_id="room"):
                with gr.Column(scale=4, min_width=320, elem_id="chat"):
                    with gr.Column(elem_id="scroll"):
                        history, live = _html("", "history"), _html("", "live")
                        with gr.Row(elem_id="examples") as examples:
                            chips = [gr.Button(text, size="sm", elem_classes="chip") for text in demo.models.about.examples[:_EXAMPLES]]
                    with gr.Row(elem_id="preferring", visible=False) as preferring:
                        left = gr.Button("◀ I prefer left", size="sm", elem_id="prefer-left")
                        right = gr.Button("I prefer right ▶", size="sm", elem_id="prefer-right")
                    with gr.Row(elem_id="actions", visible=False) as actions:
                        with gr.Row(elem_id="liking", visible=False) as liking:
                            up = gr.Button("👍", size="sm", min_width=40, elem_id="up")
                            down = gr.Button("👎", size="sm", min_width=40, elem_id="down")
                        retry = gr.Button("Retry", size="sm", min_width=60, elem_id="retry")
                        edit = gr.Button("Edit", size="sm", min_width=60, elem_id="edit")
                        new = gr.Button("New chat", size="sm", min_width=60, elem_id="new")
                        save_text = gr.Button("Save text", size="sm", min_width=60, elem_id="save-text")
                        save_row = gr.Button("Save row", size="sm", min_width=60, elem_id="save-row")
                    note = _html("", "note")
                    with gr.Row(elem_id="composer"):
                        box = gr.Textbox(
                            placeholder="Ask something…", show_label=False, label="Your question",
                            lines=1, max_lines=8, scale=9, container=False, autofocus=True, elem_id="question",
                        )  # fmt: skip
                        send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="send")
                        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, visible=False, elem_id="stop")
                with gr.Column(scale=1, min_width=260, elem_id="settings"):
                    settings = _settings(demo, has_adapter)
                    if demo.shown.picker and len(demo.models.choices()) > 1:
                        picker = gr.Dropdown(demo.models.choices(), value=demo.models.name, label="Run (changes it for everybody)", elem_id="run")
                    else:
                        picker = None
            with gr.Tab("Report", elem_id="report-tab"):
                _html('<div class="report-frame"><p class="muted">The report is being opened…</p></div>', "report")
            with gr.Tab("Preferences", elem_id="preferences-tab") as preferences_tab:
                preferences = _html(demo.preferences(), "preferences")
        exported = _html("", "exported", visible="hidden")

        parts = [history, live, box, send, stop, actions, preferring, liking, examples, note]
        assert len(parts) == len(PARTS)
        gr.on([box.submit, send.click], _with_request(demo.ask), [box, *settings], parts, **free)
        for chip in chips:
            chip.click(_with_request(demo.ask), [chip, *settings], parts, **free)
        retry.click(_with_request(demo.retry), settings, parts, **free)
        stop.click(_bound(demo.stop), None, None, **free)
        edit.click(_bound(demo.edit), None, parts, **free)
        new.click(_bound(demo.new), None, parts, **free)
        for button, place in ((left, 0), (right, 1)):
            button.click(_bound(demo.prefer, place), None, parts, **free)
        for button, vote in ((up, "up"), (down, "down")):
            button.click(_bound(demo.like, vote), None, parts, **free)
        for button, kind in ((save_text, "text"), (save_row, "row")):
            button.click(_bound(demo.export, kind), None, exported, **free)
        preferences_tab.select(demo.preferences, None, preferences, **free)
        if picker is not None:
            changed = picker.input(_with_request(demo.change), picker, parts, **free)
            changed.then(demo.heading, None, heading, **free)
        page.unload(_bound(demo.end))
    page.queue(max_size=demo.limits.sessions, api_open=False)  # our own bound, of questions that wait, comes long before
    page._queue.sleep_when_free = 0.02  # it looks for events a thousand times a second otherwise, which keeps a core warm
    page.max_threads = demo.limits.waiting + 32  # each answer under way holds one, waiting ones too
    return page


def _settings(demo: Demo, has_adapter: bool) -> list[Any]:
    """The pickers, in the order in which `asking_of` reads them."""
    languages = [language.english_name for language in ReasoningLanguage]
    with gr.Accordion("How it answers", open=True, elem_id="how"):
        mode = gr.Radio([mode.value for mode in Mode], value=Mode.TUNED.value, label="Who answers", visible=has_adapter, elem_id="mode")
        language = gr.Dropdown([_AS_TRAINED, AS_USER, *languages], value=_AS_TRAINED, label="Reasoning language", elem_id="language")
        effort = gr.Radio([_AS_TRAINED, *Effort], value=_AS_TRAINED, label="Reasoning effort", elem_id="effort")
    with gr.Accordion("More", open=False, elem_id="more"):
        temperature = gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature", info="0: always the likeliest", elem_id="temperature")
        most = demo.limits.reply_tokens
        longest = gr.Slider(16, most, value=min(1024, most), step=16, label="Reply tokens", elem_id="longest")
        system = gr.Textbox(label="System text", lines=2, max_lines=6, placeholder="none", elem_id="system")
    return [mode, language, effort, temperature, longest, system]


def asking_of(mode: str, language: str, effort: str, temperature: float, longest: float, system: str) -> Asking:
    """The pickers' values, which a browser may have made up. `FastossError` for what the page does not offer."""
    try:
        chosen = Mode(mode)
        wanted = None if effort == _AS_TRAINED else str(Effort(effort))
        number, most = float(temperature), int(longest)
    except (ValueError, TypeError, OverflowError):
        raise FastossError("these settings are not offered by the page", hint="reload it") from None
    if not (0 <= number <= 2 and most >= 1 and isinstance(system or "", str)):
        raise FastossError("these settings are not offered by the page", hint="reload it")
    return Asking(chosen, wanted, "" if language == _AS_TRAINED else str(language), number, system or "", most)


def _html(value: str, name: str, **more: Any) -> gr.Markdown:
    """A place for HTML of ours. `gr.HTML` would evaluate it as a template; this one takes it through DOMPurify."""
    return gr.Markdown(value, elem_id=name, sanitize_html=True, latex_delimiters=[], container=False, **more)


def _with_request(method: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Gradio hands the request over where a parameter's annotation asks for it, by its position."""

    def called(request: gr.Request, *values: Any) -> Iterator[Any]:
        yield from method(*values, request=request)

    return called


def _bound(method: Callable[..., Any], *values: Any) -> Callable[[gr.Request], Any]:
    def called(request: gr.Request) -> Any:
        return method(*values, request=request)

    return called


def _words(problem: FastossError) -> str:
    return problem.fact[:1].upper() + problem.fact[1:] + (f" ({problem.hint})." if problem.hint else ".")
