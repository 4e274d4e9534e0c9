"""The local engine: a Flower grid that runs each virtual client inside this process.

A client runs when its reply is pulled, one at a time. Only one reply exists at once, the base model is shared, the
order is the order of asking, and a debugger sees everything.

Two details are private to flwr 1.41 and pinned by a test: `Message` reads the process-wide `TaskIdentity`, and
message ids are stamped by whoever carries the message.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """`nodes` virtual nodes that run `app` in this process.

    Args:
        app: the ClientApp.
        nodes: how many virtual nodes.
        run_config: given to every node's context.
    """

    def __init__(self, app: ClientApp, nodes: int, run_config: dict[str, Any] | None = None) -> None:
        self._app = app
        self._run = Run.create_empty(1)
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
        self._waiting: dict[str, Message] = {}
        self._stamped = 0
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={PARTITION_ID_KEY: index, NUM_PARTITIONS_KEY: nodes},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for index, node in enumerate(range(1000, 1000 + nodes))
        }

    def set_run(self, run: Run) -> None:
        """Keep the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; they are always there."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages: clients run when replies are pulled. Unpulled older ones go, for nobody waits for them."""
        self._waiting = {self._stamp(message): message for message in messages}
        return list(self._waiting)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the first waiting client among `message_ids` and return its one reply."""
        for message_id in message_ids:
            if message_id in self._waiting:
                return [self._execute(self._waiting.pop(message_id))]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run the clients one after the other as the replies are consumed."""
        for message_id in self.push_messages(messages):
            yield from self.pull_messages([message_id])

    def _stamp(self, message: Message) -> str:
        self._stamped += 1
        message.metadata.__dict__["_message_id"] = f"m{self._stamped}"
        return message.metadata.message_id

    def _execute(self, message: Message) -> Message:
        try:
            reply = self._app(message, self._contexts[message.metadata.dst_node_id])
        except OSError:  # this machine's own disk
            raise
        except Exception as error:  # what a real node would turn into an error reply
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)
        self._stamp(reply)
        return reply
