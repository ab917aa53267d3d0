// Verifies what comes on stdin, {key, headers, body}, with the official library; `key` decides between v1 and v1a.
// For v1a, which the library does not know, Node's own ed25519 is used, by the specification's words.
const crypto = require("crypto");
const { Webhook } = require("standardwebhooks");

const { key, headers, body } = JSON.parse(require("fs").readFileSync(0, "utf8"));
if (key.startsWith("whpk_")) {
  const raw = Buffer.from(key.slice("whpk_".length), "base64");
  const spki = Buffer.concat([Buffer.from("302a300506032b6570032100", "hex"), raw]);
  const verifier = crypto.createPublicKey({ key: spki, format: "der", type: "spki" });
  const signed = Buffer.from(`${headers["webhook-id"]}.${headers["webhook-timestamp"]}.${body}`);
  const right = headers["webhook-signature"].split(" ").some((each) => {
    const [version, signature] = each.split(",");
    return version === "v1a" && crypto.verify(null, signed, verifier, Buffer.from(signature, "base64"));
  });
  if (!right) throw new Error("No matching signature found");
  process.stdout.write(JSON.stringify(JSON.parse(body)));
} else {
  process.stdout.write(JSON.stringify(new Webhook(key).verify(body, headers)));
}
