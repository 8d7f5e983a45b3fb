"""Sets of conversations: compatibility checks, lines for reports, and the settings that checkpoints store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.packing import PackedPlan, TooLong
from ropepp_lit.errors import UsageError

TEMPLATE_KEY = "chat_template"
"""Key of the chat template in tokenizer_config.json."""


def check_conversations(
    train: Mapping[str, Manifest],
    validation: Sequence[tuple[str, Manifest]],
    *,
    intra_document_masking: bool,
    too_long: TooLong,
) -> None:
    """Check that training and validation sets are compatible with each other and with the options.

    Args:
        train: Manifest of each training set.
        validation: Name and manifest of each additional validation set.
        intra_document_masking: See :class:`~ropepp_lit.data.token_data.TokenData`.
        too_long: See there.

    Raises:
        UsageError: Conversations could attend to each other, or were rendered by different templates; only some sets
            contain pairs of answers, or pairs would be truncated.
    """
    templates: dict[str, str] = {}
    first, ours = next(iter(train.items()))
    for name, manifest in [*train.items(), *validation]:
        if manifest.holds_pairs != ours.holds_pairs:
            pairs, other = (name, first) if manifest.holds_pairs else (first, name)
            raise UsageError(
                f"data: {pairs} contains pairs of answers and {other} does not; use sets of one kind for training and "
                "validation"
            )
        if manifest.holds_pairs and too_long == "cut":
            raise UsageError(
                f"data.too_long: {name} contains pairs of answers, which cannot be compared if they are cut; use drop"
            )
        if manifest.marks_trained_tokens and not intra_document_masking:
            raise UsageError(
                f"data.intra_document_masking: with false, conversations packed in one row attend to each other, and "
                f"{name} contains conversations; set it to true"
            )
    for name, manifest in train.items():
        if manifest.chat_template is not None:
            templates.setdefault(manifest.chat_template, name)
    if len(templates) > 1:
        one, other = list(templates.values())[:2]
        raise UsageError(
            f"data.source: {other} was rendered by a different chat template than {one}, but a model has only one; "
            "prepare one of them again with the template of the other (--chat_template)"
        )


def document_kind(manifest: Manifest) -> str:
    """Return the name of a packed set's documents in messages."""
    return "pairs of answers" if manifest.holds_pairs else "conversations"


def too_long_line(name: str, plan: PackedPlan, manifest: Manifest, too_long: TooLong) -> str | None:
    """Return a line about conversations that are longer than the context; None if there are none.

    Args:
        name: Name of the split and its source.
        plan: Plan of the split.
        manifest: Manifest of the set.
        too_long: See :class:`~ropepp_lit.data.token_data.TokenData`.
    """
    lengths, kind = plan.lengths, document_kind(manifest)
    if not lengths.too_long:
        return None
    count = plan.documents + lengths.too_long if too_long == "drop" else plan.documents + lengths.untrained
    line = f"data: {name}: {lengths.too_long:,} of {count:,} {kind} are longer than data.context_length "
    line += f"{plan.row_length - 1:,} (the longest has {lengths.longest:,} tokens) and are "
    if too_long == "drop":
        return f"{line}left out" + ("" if manifest.holds_pairs else "; data.too_long cut keeps their beginnings")
    skipped = f"; {lengths.untrained:,} of them keep no trained token and are left out" if lengths.untrained else ""
    return f"{line}cut to their beginnings{skipped}"


def packing_line(name: str, plan: PackedPlan, manifest: Manifest, *, rows_per_step: float) -> str:
    """Return a line about the packing of a training set's conversations and their trained tokens.

    Args:
        name: Name of the set.
        plan: Plan of its training split.
        manifest: Manifest of the set.
        rows_per_step: Average number of its rows per optimizer step.
    """
    train, skipped = manifest.splits["train"], manifest.splits["train"].documents - plan.documents
    return (
        f"{name}: {plan.documents:,} {document_kind(manifest)} in {plan.samples_per_pass:,} rows, "
        f"{plan.padding:.1%} padding"
        + (f", {skipped:,} left out" if skipped else "")
        + f"; {train.trained_tokens / train.tokens:.1%} of the set's tokens are trained; "
        f"all are read once in {plan.samples_per_pass / rows_per_step:,.1f} steps"
    )


def chat_settings(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Return the entries `tokenizer_config` and `generation_config` of a checkpoint (JSON) for sets of conversations.

    Args:
        manifests: Manifests of the training sets.

    Returns:
        The chat template, and the EOS token with the tokens that end an assistant's turn; empty if no set contains
        conversations.
    """
    settings: dict[str, str] = {}
    if template := next((m.chat_template for m in manifests if m.chat_template is not None), None):
        settings["tokenizer_config"] = json.dumps({TEMPLATE_KEY: template})
    ends = [token for manifest in manifests for token in manifest.end_of_turn]
    if ends:
        settings["generation_config"] = json.dumps(
            {"eos_token_id": list(dict.fromkeys([manifests[0].eos_token_id, *ends]))}
        )
    return settings


def merge_settings(base: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the settings of a base model with those of the run's conversations.

    Args:
        base: Entries of the base model's checkpoint, including `tokenizer_config` and `generation_config` (JSON or
            None).
        data: Entries of the data, including those of :func:`chat_settings`. Their template replaces the base's; the
            tokens that end generation are those of both.

    Returns:
        The merged entries.
    """
    merged = dict(base)
    for key in data.keys() & {"tokenizer_config", "generation_config"}:
        old, new = json.loads(base.get(key) or "{}"), json.loads(data[key])
        if key == "generation_config":
            ends = old.get("eos_token_id")
            ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
            new["eos_token_id"] = list(dict.fromkeys([*ends, *new["eos_token_id"]]))
        merged[key] = json.dumps({**old, **new})
    return merged


def template_of(entry: Mapping[str, Any]) -> str | None:
    """Return the (default) chat template stored in a checkpoint's or data's entry; None if there is none."""
    template = json.loads(entry.get("tokenizer_config") or "{}").get(TEMPLATE_KEY)
    if isinstance(template, list):
        return next((each["template"] for each in template if each.get("name") == "default"), None)
    return template


def special_token_notes(manifests: Sequence[tuple[str, Manifest]]) -> Iterator[str]:
    """Iterate over notes about sets whose special tokens or chat template differ from those of the first manifest.

    Document bounds do not depend on these tokens, but prompts and the end of generated text do.
    """
    first, ours = manifests[0]
    for name, manifest in manifests[1:]:
        for key in ("opening", "eos_token_id"):
            theirs, expected = getattr(manifest, key), getattr(ours, key)
            if theirs != expected:
                yield (
                    f"Note: {key} is {theirs} in {name} and {expected} in {first}; prompts and generated text follow "
                    f"{first}."
                )
        if None not in (manifest.chat_template, ours.chat_template) and manifest.chat_template != ours.chat_template:
            yield f"Note: {name} was rendered by a different chat template than {first}."
