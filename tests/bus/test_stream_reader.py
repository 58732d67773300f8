"""Reading a stream with a consumer and by direct requests."""

from __future__ import annotations

import pytest
from corral.bus.stream_reader import Delivery, MessagesLost, deliveries, delivery, last, pull, read, read_direct
from corral.schemas import subjects
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.errors import NoRespondersError
from nats.js import api


@pytest.mark.parametrize("prefix", ["$JS.ACK", "$JS.ACK.domain.account"])
def test_the_place_of_a_delivered_message_with_and_without_a_domain(prefix: str) -> None:
    rest = ".random" if "domain" in prefix else ""
    reply = f"{prefix}.CORRAL_FACTS.reader.2.17.5.1764464400123456789.3{rest}"
    assert delivery(reply.encode()) == Delivery(sequence=17, number=5, stored_ns=1764464400123456789, pending=3)


@given(st.lists(st.tuples(*[st.integers(0, 2**63)] * 4), min_size=1), st.sampled_from(["", ".random", ".7"]), st.data())
def test_the_places_of_many_messages_are_those_of_each(
    found: list[tuple[int, int, int, int]], rest: str, data: st.DataObject
) -> None:
    prefix = "$JS.ACK.domain.account" if rest else "$JS.ACK"
    replies = [f"{prefix}.CORRAL_FACTS.reader.1.{'.'.join(map(str, one))}{rest}".encode() for one in found]
    numbers = deliveries(replies)
    assert numbers is None if rest else numbers == [number for one in found for number in one]
    at = data.draw(st.integers(0, len(replies) - 1))
    replies.insert(
        at, replies[at].replace(b"reader.1.", data.draw(st.sampled_from([b"reader.2.", b"other.1.", b"1."])))
    )
    assert deliveries(replies) is None


async def test_both_ways_of_reading_find_the_same_messages(nc: Client) -> None:
    js = nc.jetstream()
    subject = f"{subjects.EVENTS}.*"
    for number in range(1200):  # more than two requests
        await nc.publish(f"{subjects.EVENTS}.h{number % 3}", str(number).encode())
    await js.publish(f"{subjects.LEASE_EVENTS}.granted.l1", b"other")
    by_consumer = [
        message async for message in read(nc, subjects.FACTS_STREAM, subject, api.ConsumerConfig(), until=1200)
    ]
    direct = [message async for message in read_direct(nc, subjects.FACTS_STREAM, subject)]
    assert [message.data for message in direct] == [str(number).encode() for number in range(1200)]
    assert [message[:3] for message in by_consumer] == [message[:3] for message in direct]
    times = [message.stored_at for message in direct]
    assert [message.stored_at for message in by_consumer] == pytest.approx(times, abs=1e-5, rel=0)
    newest = await last(nc, subjects.FACTS_STREAM, f"{subjects.EVENTS}.h2")
    assert newest == direct[-1]


async def test_a_stream_is_not_read_with_a_gap_or_without_an_end(nc: Client) -> None:
    """A consumer goes when its server is restarted, and messages are lost that are on their way meanwhile."""
    js = nc.jetstream()
    for number in range(1599):
        await nc.publish(f"{subjects.EVENTS}.h", str(number).encode())
    await js.publish(f"{subjects.EVENTS}.h", b"the last")
    other = (await nc.subscribe(nc.new_inbox())).subject

    async def reading(disturb: str) -> list[int]:
        found: list[int] = []
        async for message in read(nc, subjects.FACTS_STREAM, f"{subjects.EVENTS}.*", api.ConsumerConfig()):
            found.append(message.sequence)
            if len(found) == 1:
                [consumer] = await js.consumers_info(subjects.FACTS_STREAM)
                if disturb == "gone":
                    await js.delete_consumer(subjects.FACTS_STREAM, consumer.name)
                else:  # others get some of what it has next
                    await pull(nc, subjects.FACTS_STREAM, consumer.name, other, 100, 60.0)
        return found

    with pytest.raises(NoRespondersError):
        await reading("gone")
    with pytest.raises(MessagesLost):
        await reading("lost")
