-- A past and a backlog for the tests of plans: a million jobs that ended, a hundred thousand that wait, and a hundred
-- thousand callbacks. Statistics are there as autovacuum would leave them.

-- the checks of foreign keys and the trigger would take most of the time, and guard nothing here
SET session_replication_role = replica;
SELECT setseed(0.5);

INSERT INTO profiles (id, username)
SELECT lpad(to_hex(n), 32, '0')::uuid, 'user ' || n FROM generate_series(1, 1000) n;
INSERT INTO queues (name) VALUES ('sdxl'), ('wan'), ('qwen');

INSERT INTO jobs (id, user_id, job_type, format, quality, model_type, status, stage, original_prompt, params, attempts,
                  created_at, started_at, completed_at, generation_time_ms)
SELECT lpad(to_hex(n), 32, '0')::uuid, lpad(to_hex(1 + n % 1000), 32, '0')::uuid, 'sdxl_image_fast', 'image', 'fast',
       'sdxl', 'completed', 'generate', 'a lighthouse', '{}', 1, began, began, began + interval '4 seconds', 4000
FROM (SELECT n, now() - interval '90 days' + n * interval '5 seconds' AS began FROM generate_series(1, 1000000) n) past;

INSERT INTO jobs (id, user_id, job_type, format, quality, model_type, stage, original_prompt, params, callback_url)
SELECT ('eeeeeeee' || lpad(to_hex(n), 24, '0'))::uuid, lpad(to_hex(1 + n % 1000), 32, '0')::uuid, 'video_fast', 'video',
       'fast', 'wan', 'generate', 'waves', '{}', 'https://example.com/hook'
FROM generate_series(1, 100000) n;

-- half of them wait in either queue, one in fifty for its time
INSERT INTO job_queue (job_id, user_id, queue, tag, cost, state, run_at)
SELECT id, user_id, CASE WHEN n % 2 = 0 THEN 'wan' ELSE 'sdxl' END, 1000 + random() * 1000000, 40,
       (CASE WHEN n % 50 = 1 THEN 'scheduled' ELSE 'ready' END)::queue_state, now() + interval '1 hour'
FROM (SELECT id, user_id, row_number() OVER () AS n FROM jobs WHERE status = 'queued') waiting;
UPDATE job_queue
SET state = 'running', attempt = 1, worker = '00000000-0000-0000-0000-000000000abc', lease_until = now() + interval '1 hour'
WHERE job_id IN (SELECT job_id FROM job_queue WHERE queue = 'wan' AND state = 'ready' LIMIT 40);

INSERT INTO callback_outbox (id, job_id, user_id, seq, event_type, terminal, url, body, state, next_at, delivered_at)
SELECT 'msg_' || n, lpad(to_hex(n), 32, '0')::uuid, lpad(to_hex(1 + n % 1000), 32, '0')::uuid, 2, 'job.completed', true,
       'https://example.com/hook', '\x7b7d', CASE WHEN n % 2 = 0 THEN 'delivered' ELSE 'due' END,
       now() + interval '1 day', CASE WHEN n % 2 = 0 THEN now() END
FROM generate_series(1, 100000) n;
UPDATE callback_outbox SET next_at = now() - interval '1 minute' WHERE id IN ('msg_1', 'msg_3', 'msg_5');

SET session_replication_role = DEFAULT;
VACUUM ANALYZE profiles, jobs, job_queue, callback_outbox, queues, fair_shares, job_events;
