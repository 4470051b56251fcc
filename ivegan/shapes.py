"""Array annotations with shapes: ``Float[Tensor, "n c h w"]``.

They are checked when the tests run (jaxtyping with beartype) and cost nothing elsewhere. Training
must also run where torch, numpy, pillow and safetensors are all there is, so jaxtyping is optional.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
else:
    try:
        from jaxtyping import Float, Int, UInt8
    except ModuleNotFoundError:

        class Float:
            """Stands for any array where jaxtyping is not installed."""

            def __class_getitem__(cls, item: object) -> Any:
                return Any

        Int = UInt8 = Float

__all__ = ["Float", "Int", "UInt8"]
