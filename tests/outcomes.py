"""What training has made of a model, and whether it is the same elsewhere."""

import torch


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Tensors, lists or dictionaries of them, or the weights of models; to the bit, or as near as is said."""
    found, wanted = (weights(x) if isinstance(x, torch.nn.Module) else x for x in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def trained(trainer, **options):
    trainer.train(**options)
    return trainer
