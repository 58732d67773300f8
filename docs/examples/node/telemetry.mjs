// Prints samples as they come, one line of JSON each, decoded using docs/reference/telemetry.md and the JSON Schema of a
// batch, which has the type of each column.
//
// npm ci && node telemetry.mjs [batches]
import { readFileSync } from "node:fs";
import { decode } from "@msgpack/msgpack";
import { connect, nkeyAuthenticator } from "nats";

const { CORRAL_NATS_URL, CORRAL_NATS_CREDS } = process.env;
const schema = JSON.parse(readFileSync(new URL("../../reference/schemas/SampleBatch.json", import.meta.url), "utf8"));

const file = CORRAL_NATS_CREDS ? readFileSync(CORRAL_NATS_CREDS, "utf8") : "";
const facts = Object.fromEntries([...file.matchAll(/^# (\w+): (\S+)/gm)].map(([, name, value]) => [name, value]));
const seed = file.match(/^SU[A-Z2-7]{56}$/m)?.[0];
const known = seed && { authenticator: nkeyAuthenticator(new TextEncoder().encode(seed)), inboxPrefix: facts.inbox };
const servers = CORRAL_NATS_URL || "nats://127.0.0.1:4222";
// A long timeout for a busy machine. If no server listens it fails at once.
const nc = await connect({ servers, timeout: 60_000, ...known });

const read = {
  float32: [4, (view, at) => view.getFloat32(at, true)],
  int32: [4, (view, at) => view.getInt32(at, true)],
  int64: [8, (view, at) => view.getBigInt64(at, true)],
};

// The bytes may begin at any offset in the message; a DataView needs no alignment.
function numbers(bytes, type) {
  const [size, get] = read[type];
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return Array.from({ length: bytes.byteLength / size }, (_, number) => get(view, number * size));
}

// A value that is impossible for its metric is null in the history, too.
function possible(value, part) {
  const finite = typeof value === "bigint" || Number.isFinite(value);
  return finite && !(value < part["x-minimum"]) && !(value > part["x-maximum"]);
}

function* rows(batch) {
  const times = numbers(batch.times_ns, "int64");
  const types = Object.entries(schema.properties.columns.properties).filter(([name]) => name in batch.columns);
  const columns = types.map(([name, part]) => [name, numbers(batch.columns[name], part["x-element-type"]), part]);
  const nulls = batch.nulls ?? {}; // absent if there are none
  for (const [number, time_ns] of times.entries()) {
    const row = { host: batch.host, device: batch.devices[number % batch.devices.length], time_ns };
    for (const [name, values, part] of columns) {
      row[name] = !nulls[name]?.[number] && possible(values[number], part) ? values[number] : null;
    }
    yield row;
  }
}

const subscription = nc.subscribe("corral.v1.samples.*", { max: Number(process.argv[2] ?? 1) });
for await (const message of subscription) {
  for (const row of rows(decode(message.data, { useBigInt64: true }))) {
    // 64-bit integers as text: JavaScript's JSON would round them.
    console.log(JSON.stringify(row, (_, value) => (typeof value === "bigint" ? String(value) : value)));
  }
}
await nc.close();
