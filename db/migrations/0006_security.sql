-- Row-level security: the real guard of what users read, and of what replicas write.
-- Users read their own rows; moderators and admins read all of them; nobody writes through these roles but replicas,
-- which may move jobs and nothing else. Sub-selects in the policies make Postgres ask once per statement, not per row.
-- The owner of the tables (the API) is the only other writer.

DO $$
DECLARE t text;
BEGIN
  FOR t IN SELECT tablename FROM pg_tables WHERE schemaname = 'public'
             AND tablename NOT LIKE 'schema_migrations' LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
  END LOOP;
END $$;

CREATE FUNCTION ourvidz.reads_all() RETURNS boolean
LANGUAGE sql STABLE AS $$
  SELECT has_role(ourvidz.uid(), 'admin') OR has_role(ourvidz.uid(), 'moderator')
$$;

GRANT SELECT ON profiles, user_roles, jobs, job_events, workspace_assets, user_library, usage_logs TO authenticated;
-- a user sees that a key exists and when it was used, never its hash
GRANT SELECT (id, user_id, name, prefix, created_at, last_used_at, expires_at, revoked_at) ON api_keys TO authenticated;
GRANT SELECT ON callback_endpoints TO authenticated;  -- their secrets are derived, and in no column
GRANT SELECT (id, job_id, user_id, endpoint_id, seq, event_type, url, state, attempts, next_at, last_status, last_error,
              created_at, delivered_at) ON callback_outbox TO authenticated;
GRANT SELECT (job_id, user_id, queue, class, tag, state, run_at, attempt, failures, cancel, phase, step, steps)
  ON job_queue TO authenticated;

CREATE POLICY own_or_staff ON profiles FOR SELECT TO authenticated USING (id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all()));
CREATE POLICY own_or_staff ON user_roles FOR SELECT TO authenticated USING (user_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all()));
CREATE POLICY own_or_staff ON jobs FOR SELECT TO authenticated USING (user_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all()));
CREATE POLICY own_or_staff ON job_events FOR SELECT TO authenticated USING (user_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all()));
CREATE POLICY own_or_staff ON workspace_assets FOR SELECT TO authenticated USING (user_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all()));
CREATE POLICY own_or_staff ON user_library FOR SELECT TO authenticated USING (user_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all()));
CREATE POLICY own_or_staff ON usage_logs FOR SELECT TO authenticated USING (user_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all()));
GRANT SELECT ON user_activity_log TO authenticated;
CREATE POLICY own_or_admin ON user_activity_log FOR SELECT TO authenticated
  USING (user_id = (SELECT ourvidz.uid()) OR (SELECT has_role(ourvidz.uid(), 'admin')));
CREATE POLICY own_or_admin ON api_keys FOR SELECT TO authenticated
  USING (user_id = (SELECT ourvidz.uid()) OR (SELECT has_role(ourvidz.uid(), 'admin')));
CREATE POLICY own_or_staff ON callback_outbox FOR SELECT TO authenticated USING (user_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all()));
CREATE POLICY own_or_staff ON callback_endpoints FOR SELECT TO authenticated USING (user_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all()));
CREATE POLICY own_or_staff ON job_queue FOR SELECT TO authenticated USING (user_id = (SELECT ourvidz.uid()) OR (SELECT ourvidz.reads_all()));

-- How many jobs, and how many predicted seconds, stand before a waiting job. It must see other users' rows to count
-- them, so it runs as the owner; it tells two sums and only about a job that the caller may read.
CREATE FUNCTION ourvidz.standing(waiting uuid, OUT ahead bigint, OUT ahead_cost double precision)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public AS $$
  SELECT count(*), coalesce(sum(before.cost), 0)
  FROM job_queue me
  CROSS JOIN LATERAL (
    SELECT o.cost FROM job_queue o
    WHERE o.queue = me.queue AND o.state = 'ready'
      AND (o.class > me.class OR (o.class = me.class AND (o.tag, o.job_id) < (me.tag, me.job_id)))
    LIMIT 10000) before
  WHERE me.job_id = waiting AND me.state <> 'running'
    -- no role was taken on: it is the owner who asks
    AND (current_setting('role') = 'none' OR me.user_id = ourvidz.uid() OR ourvidz.reads_all())
$$;
REVOKE EXECUTE ON FUNCTION ourvidz.standing(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ourvidz.standing(uuid) TO authenticated;

-- Replicas, the deliverer and upkeep.
GRANT SELECT ON prompt_templates, negative_prompts, system_config TO ourvidz_worker;
-- what the deliverer derives a user's signing key from, and nothing personal
GRANT SELECT (id, callback_secret_version, callback_secret_rotated_at) ON profiles TO ourvidz_worker;
GRANT SELECT, UPDATE ON jobs, queues TO ourvidz_worker;
GRANT SELECT, INSERT, UPDATE ON fair_shares, workers TO ourvidz_worker;
GRANT INSERT ON queues TO ourvidz_worker;
GRANT SELECT, UPDATE, DELETE ON job_queue TO ourvidz_worker;
GRANT SELECT, INSERT, DELETE ON job_events TO ourvidz_worker;
GRANT SELECT, INSERT, DELETE ON workspace_assets TO ourvidz_worker;
GRANT SELECT, INSERT, UPDATE ON callback_outbox TO ourvidz_worker;
GRANT SELECT, INSERT, DELETE ON callback_attempts TO ourvidz_worker;
GRANT SELECT, UPDATE (failures, failing_since, disabled_at, disabled_reason) ON callback_endpoints TO ourvidz_worker;
GRANT INSERT ON user_activity_log TO ourvidz_worker;
GRANT SELECT, DELETE ON idempotency_keys, workers TO ourvidz_worker;
DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['profiles', 'prompt_templates', 'negative_prompts', 'system_config', 'jobs', 'queues',
      'fair_shares', 'workers', 'job_queue', 'job_events', 'workspace_assets', 'callback_outbox', 'callback_attempts',
      'callback_endpoints', 'idempotency_keys'] LOOP
    EXECUTE format('CREATE POLICY worker ON %I TO ourvidz_worker USING (true) WITH CHECK (true)', t);
  END LOOP;
END $$;
CREATE POLICY worker ON user_activity_log FOR INSERT TO ourvidz_worker WITH CHECK (action = 'callback_endpoint.disabled');
