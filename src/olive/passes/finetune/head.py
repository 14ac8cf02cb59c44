"""The loss of a causal language model over packed labels, through the fused head where that is exact.

Imported only where torch already is.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from olive.passes.finetune.loss import IGNORE, head_is_plain, linear_cross_entropy, reference_loss


def install_loss(causal: Any) -> bool:
    """Let a causal language model return the sum of its losses over packed, already shifted labels.

    With ``olive_loss="tokens"`` it returns the loss of each token that has a label, in order.

    Returns:
        Whether the fused head is in use; False when the head is trained or the model does more than a linear
        layer to its hidden states, and the logits come from the model itself.
    """
    plain = causal.forward
    head = causal.get_output_embeddings()
    fused = head_is_plain(head) and _head_matches(causal, plain, head)

    def forward(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("olive_loss", False)
        if not wanted:
            return plain(*args, **kwargs)
        labels, smoothing = kwargs.pop("labels").flatten(), kwargs.pop("label_smoothing", 0.0)
        keep = kwargs.pop("kept", None)
        if fused:
            hidden = causal.base_model(*args, use_cache=False, **kwargs)[0]
            losses = linear_cross_entropy(
                hidden.flatten(0, 1), head.weight, labels, bias=head.bias, smoothing=smoothing, keep=keep
            )
        else:
            if keep is None:
                keep = (labels != IGNORE).nonzero().squeeze(1)
            logits = plain(*args, use_cache=False, logits_to_keep=keep, **kwargs).logits
            losses = reference_loss(logits.flatten(0, 1), labels[keep], smoothing)
        return CausalLMOutput(loss=losses if wanted == "tokens" else losses.sum())

    causal.forward = forward
    return fused


def _head_matches(causal: Any, plain: Any, head: Any) -> bool:
    ids = torch.arange(4, device=head.weight.device)[None]
    was = causal.training
    causal.eval()
    with torch.no_grad():
        logits = plain(input_ids=ids, use_cache=False).logits.float()
        own = head(causal.base_model(input_ids=ids, use_cache=False)[0]).float()
    causal.train(was)
    return bool(torch.allclose(logits, own, rtol=1e-3, atol=1e-3 * float(own.abs().max() + 1e-6)))
