"""A site with a real key that answers all that it is asked by what is no message: `hostile_site.py KIT`.

With `flood` behind, it announces answers without end instead, of as many objects as a call takes, and hangs up.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import http_request_response

from deploy import fleet, kits


def flood(kit: kits.Kit, key: ec.EllipticCurvePrivateKey, reply: Message) -> None:
    """Announce `reply` under ever new names, and hang up once that is sent; never returns."""
    trust = (kit.folder / kits.CA).read_bytes()
    client = FleetHttpClient.from_server_address(str(kit.server), False, trust, [fleet._Signature(key, fleet.utc_now)])
    client._client.timeout = httpx.Timeout(5.0, read=0.01)
    head, node = message_to_proto(remove_content_from_message(reply)), Node(node_id=reply.metadata.src_node_id)
    while True:
        for width in (10, 250, 900):
            head.metadata.message_id = os.urandom(32).hex()
            parts = [ObjectTree(object_id=os.urandom(32).hex()) for _ in range(width)]
            tree = ObjectTree(object_id=head.metadata.message_id, children=parts)
            with contextlib.suppress(httpx.HTTPError, ValueError):
                client.PushMessages(PushMessagesRequest(node=node, messages_list=[head], message_object_trees=[tree]))


def main(folder: Path, floods: bool) -> None:
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
            if floods:
                for _ in range(8):
                    threading.Thread(target=flood, args=(kit, key, reply), daemon=True).start()
                print(f"floods {asked.metadata.message_type}", flush=True)
                continue
            reply.metadata.__dict__["_message_id"] = content.object_id
            wanted, session = send(reply, get_object_tree(content), 0.1)
            for number, each in get_all_nested_objects(content).items():
                if number in wanted:
                    push(asked.metadata.run_id, session, number, each.deflate())
            print(f"answered {asked.metadata.message_type}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["flood"])
