"""The client's half of the wire: what it holds of the server's adapter, and how its own change is encoded.

Kept apart from training, so that nothing that is coded goes back into it but what the server sees too.
"""

from __future__ import annotations

from pathlib import Path

from apiary.config.schema import RunConfig
from apiary.core.tensors import StateDict, digest, generator
from apiary.transport import codec as codecs
from apiary.transport import downlink, from_config
from apiary.transport.codec import Codec, Shapes
from apiary.transport.downlink import Copy, Parcel
from client import round_files, state
from client.site import Site
from strategies.local import LocalAlgorithm

KIND = "feedback"


def holds(config: RunConfig, folder: Path) -> str:
    """The version of the server's adapter in the client's folder; "" where it keeps none."""
    held = None if from_config.configured_codec(config, "down").whole else state.load_copy(folder)
    return "" if held is None else digest(held)


def receive(config: RunConfig, folder: Path, shapes: Shapes, sent: Parcel) -> StateDict:
    """The server's adapter once a parcel is unpacked; it is on disk before the message is answered.

    Args:
        config: the run.
        folder: the client's own of this run.
        shapes: of its adapter.
        sent: by the server.

    Raises:
        CodecError: the parcel is damaged, or builds on another adapter than the client holds. To who did not answer
            well the server sends the whole the next time.
    """
    held = state.load_copy(folder)
    before = None if held is None else Copy(digest(held), held)
    copy = downlink.receive(sent, before, from_config.configured_codec(config, "down"), shapes)
    if before is None or before.version != copy.version:
        state.save_copy(folder, copy.adapter)
    return copy.adapter


def up(config: RunConfig, local: LocalAlgorithm) -> Codec:
    """The codec of the client's own messages."""
    return from_config.configured_codec(config, "up", local.codec)


def arrives(codec: Codec, message: bytes, delta: StateDict) -> StateDict:
    """A change as the server will read it from its message; the change itself where that is exact, or there is none."""
    return codecs.decode(message, codec, codecs.shapes_of(delta)) if message and not codec.whole else delta


def encode(config: RunConfig, codec: Codec, site: Site, number: int, delta: StateDict) -> bytes:
    """The message of a client's change in round `number`.

    The same change makes the same bytes however often the round is asked: what was left out of it is kept under its
    number, and what is added to it comes from rounds before. Under differential privacy the change is the released one,
    and so is all that is ever kept.

    Args:
        config: the run.
        codec: from `up`.
        site: the client; what is left out is kept in its folder.
        number: the round, from 1.
        delta: the change.

    Raises:
        ValueError: the change holds NaN or infinity.
    """
    before = round_files.newest(site.folder, KIND, number) if codec.feedback else {}
    fitting = {name: tensor for name, tensor in before.items() if name in delta and tensor.shape == delta[name].shape}
    message, left_out = codecs.encode(delta, codec, fitting, generator(config.seed, number, site.client, "wire"))
    if codec.feedback:
        round_files.save(site.folder, KIND, number, left_out, back={round_files.sound_before(config, number)})
    return message
