"""The queue: order, estimates of durations, reservations, and who may start now.

Pure code over a `Fleet`, without a clock and without I/O: the broker calls it in real time, `corral simulate` in
virtual time. All times are seconds of one clock that the caller chooses, passed as `now`.

What a caller does with a `Line` (`line.py`):

- `entry = line.arrive(request, estimate, now, payload=…)` puts a request into the line. `estimate` comes from
  `durations.py`: `given(expected_seconds, max_seconds)`, or `Durations.estimate(kind, now)`. A request that waited
  before a restart gets its old `now` and `number`, and so its old place.
- `for start in line.serve(now)` yields who may start now, one by one, removed from the line, with the picked devices.
  The caller has the fleet hold them (`fleet.hold`) and calls `line.started(lease_id, start.entry, now)` before it takes
  the next; `placement.decide.placed` makes the grants. Other events may come in between.
- Serve after each arrival, each end of a lease, and each change of the fleet, and now and then for the time alone. The
  line finds by itself which hosts changed since: it reads the log of the fleet's index. A request that does not wait is
  the same: arrive, serve, and if it is still in the line, `withdraw` and reject it.
- `line.withdraw(entry)` removes a request. `line.pause(entry)` keeps its place but not its start, as its client must be
  heard first; `line.resume(entry)` undoes that. After `next`, `line.unready` has paused ones whose turn it was.
- `line.ended(lease_id, now)` before the fleet frees what a lease held. `line.adopt(lease_id, …)` for leases of before a
  restart.
- `with line.protected(entry or None, priority, seconds, now)` shows a fleet that lacks what is kept from a request, to
  explain or to answer about a newcomer. `line.held` lists the reservations in force, each with its expected start.
- `iter(line)`, `len(line)`, `line.position(entry)`, `entry.estimate`, `entry.behind_none_after` are for the listing;
  expected starts come from `forecast.py`.
"""
