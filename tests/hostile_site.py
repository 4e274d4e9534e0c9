"""A site with a real key that answers all that it is asked by what is no message: `hostile_site.py KIT`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supernode.fleet_http_connection import http_request_response

from deploy import kits


def main(folder: Path) -> None:
    kit = kits.read(folder, "site")
    key = load_ssh_private_key((kit.folder / kits.SITE_KEY).read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    pair, trust = (key, key.public_key()), (kit.folder / kits.CA).read_bytes()
    with http_request_response(str(kit.server), False, trust, pair) as (_, receive, send, _, _, _, push, _):
        print("hostile site connected", flush=True)
        while True:
            if (received := receive()) is None:
                time.sleep(0.5)
                continue
            asked, _ = received
            content = RecordDict({"x": ConfigRecord({"x": 1})})
            reply = Message(content, reply_to=asked)
            reply.metadata.__dict__["_message_id"] = content.object_id
            wanted, session = send(reply, get_object_tree(content), 0.1)
            for number, each in get_all_nested_objects(content).items():
                if number in wanted:
                    push(asked.metadata.run_id, session, number, each.deflate())
            print(f"answered {asked.metadata.message_type}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
