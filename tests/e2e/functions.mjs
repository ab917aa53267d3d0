// Drives the functions as a web client does: supabase-js against the address, the key and the calls that come on stdin.
// Writes the answers to stdout, one for each call: {data} or {error, status, body}.
import { createClient } from "@supabase/supabase-js";
import { readFileSync } from "node:fs";

const { url, key, calls } = JSON.parse(readFileSync(0, "utf8"));
const client = createClient(url, key, { auth: { persistSession: false, autoRefreshToken: false } });
const answers = [];
for (const { name, body } of calls) {
  const { data, error } = await client.functions.invoke(name, { body });
  answers.push(
    error === null
      ? { data }
      : { error: error.name, status: error.context?.status, body: await error.context?.json?.().catch(() => null) },
  );
}
process.stdout.write(JSON.stringify(answers));
