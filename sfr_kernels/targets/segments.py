"""The text of each anchor's segment."""

from torch import Tensor

from ..rows import SupervisedRows


def segment_texts(
    labels: Tensor,  # (B, L), as given to SupervisedRows.from_labels
    rows: SupervisedRows,
    tokenizer,  # of the language model
) -> list[str]:  # A texts; "" where the target is zero
    """Decodes the future text of every anchor. Halves of a character at either end are left out."""
    flat = labels.reshape(-1).tolist()
    pieces = [flat[start:stop] for start, stop in rows.segments.tolist()]
    texts = tokenizer.batch_decode(pieces, skip_special_tokens=True) if pieces else []
    return [text.strip("\ufffd").strip() for text in texts]
