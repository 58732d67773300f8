// Corral from Node: NATS and JSON.
//
// npm ci && node work.mjs
import { readFileSync } from "node:fs";
import { userInfo } from "node:os";
import { connect, JSONCodec, nkeyAuthenticator } from "nats";

const json = JSONCodec();
const { CORRAL_NATS_URL, CORRAL_NATS_CREDS, CORRAL_OWNER } = process.env;

// The file also contains the owner, the user, and the inbox prefix that only this user may subscribe to.
const file = CORRAL_NATS_CREDS ? readFileSync(CORRAL_NATS_CREDS, "utf8") : "";
const facts = Object.fromEntries([...file.matchAll(/^# (\w+): (\S+)/gm)].map(([, name, value]) => [name, value]));
const seed = file.match(/^SU[A-Z2-7]{56}$/m)?.[0];
const known = seed && { authenticator: nkeyAuthenticator(new TextEncoder().encode(seed)), inboxPrefix: facts.inbox };
const owner = (facts.owner !== "*" && facts.owner) || CORRAL_OWNER || userInfo().username;
const servers = CORRAL_NATS_URL || "nats://127.0.0.1:4222";
// A long timeout for a busy machine. If no server listens it fails at once.
const nc = await connect({ servers, timeout: 60_000, ...known });

// Send a request and return its answer; an answer of type `error` has a message that says what to do.
async function ask(subject, body) {
  const reply = json.decode((await nc.request(subject, json.encode(body), { timeout: 10_000 })).data);
  if (reply.type === "error") throw new Error(`${reply.code}: ${reply.message}`);
  return reply;
}

const events = nc.subscribe("corral.v1.leases.>", {
  callback: (_, message) => {
    const { kind, lease } = json.decode(message.data);
    console.log(`  event: ${kind} ${lease.lease_id}`);
  },
});
await nc.flush();

const reply = await ask(`corral.v1.plan.request.${owner}`, {
  owner,
  gpus: 2,
  gpu_memory_bytes: 20 * 2 ** 30,
  ttl_seconds: 60,
  name: "node",
});
if (reply.type === "rejection") {
  console.error(`rejected: ${reply.message}`);
  process.exit(4);
}
const { lease_id, grants } = reply.lease;
for (const { host, index, model, device } of grants) console.log(`${host}:${index} ${model} ${device}`);

const renewed = await ask(`corral.v1.plan.renew.${owner}`, { owner, lease_id });
console.log(`renewed until ${renewed.expires_at}`);

const { rows } = await ask(`corral.v1.query.${facts.user || owner}`, {
  sql: "SELECT host, count(*) AS samples FROM samples GROUP BY host ORDER BY host",
});
for (const [host, samples] of rows) console.log(`${host}: ${samples} samples in the history`);

await ask(`corral.v1.plan.release.${owner}`, { owner, lease_id });
await new Promise((done) => setTimeout(done, 500)); // for the last event
events.unsubscribe();
await nc.close();
