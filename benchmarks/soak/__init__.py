"""The soak: faults at random moments of a real deployment, each many times over.

A server and three sites run as real processes of this machine, on 127.0.0.1 alone, with the built-in model. Runs of 24
rounds follow each other; in each some faults hit, one after the other, each at a random moment: while the run starts,
while the sites work, or between two rounds, and up to three seconds later. What became of each is a JSON line.

How faults are made, none of which needs a change of what is tested:

- **A process killed**: `kill -9` of the node, the worker or all of a site, of the SuperLink, of the run's own process,
  or of the door.
- **A full disk**: a site's state, and the server's state with its run directories, each lie on a tmpfs of their own,
  mounted in a mount namespace of the soak (`unshare --mount`, as root or in a user namespace). A file takes all room
  that there is, again and again, until it is removed. Where nothing may be mounted, these two are left out and named.
- **The network cut**: each site reaches the door through a TCP relay of the soak's own, which is closed (connections
  are reset and refused), is silent (bytes stay where they are), or resets connections in the middle of a body.
- **A straggler**: SIGSTOP of a worker past `strategy.deadline_s`, then SIGCONT.
- **A clock a day off**: `datetime.now` of the site's node, by a `sitecustomize` in its path that reads the difference
  from a file; by that clock its calls are signed. `time.time` stays, for gRPC compares it with the kernel's.

python -m benchmarks.soak [--times 20] [--faults node,door] [--seed 0] [--out build/soak.jsonl]
"""
