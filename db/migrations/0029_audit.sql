-- Who did what is told whole and can't be forged, and limits that could not be understood are never stored.

-- ------------------------------------------------------------------------------------------------------- the limits

-- jsonb keeps how a number was written, and 20.0 is no int: whole numbers are stored without a point.
UPDATE system_config SET config = config || (
  SELECT coalesce(jsonb_object_agg(name, trunc(value::numeric)), '{}')
  FROM jsonb_each(config) AS given(name, value)
  WHERE name IN ('maxConcurrentJobs', 'maxJobsPerUser', 'maxJobsPerHour', 'rateLimitRequestsPerMinute', 'burst')
    AND jsonb_typeof(value) = 'number');

CREATE OR REPLACE FUNCTION ourvidz.is_config(config jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
  SELECT jsonb_typeof(config) = 'object' AND NOT EXISTS (
    SELECT FROM jsonb_each(config) AS given(name, value)
    WHERE value <> 'null' AND NOT CASE
      WHEN name IN ('maxConcurrentJobs', 'maxJobsPerUser', 'maxJobsPerHour', 'rateLimitRequestsPerMinute', 'burst')
        THEN CASE WHEN jsonb_typeof(value) = 'number' AND value::text ~ '^[0-9]+$'
               THEN value::numeric BETWEEN 1 AND 1000000 ELSE false END
      WHEN name = 'maxStoragePerUserGB'
        THEN CASE jsonb_typeof(value) WHEN 'number' THEN value::numeric > 0 AND value::numeric <= 1000000 ELSE false END
      WHEN name IN ('maintenanceMode', 'chargeCredits') THEN jsonb_typeof(value) = 'boolean'
      ELSE true END)
$$;

-- As before, but for a batch that is larger than a limit: waiting does not help it, whatever there is room for.
CREATE OR REPLACE FUNCTION ourvidz.admit(
  submissions int[], owners uuid[], jobs int[], credits numeric[], exempt boolean[], anew boolean,
  OUT refusals jsonb, OUT charging boolean)
LANGUAGE plpgsql AS $$
DECLARE
  conf record;
  one record;
  quota ourvidz.user_quotas;
  holder uuid;
  moment timestamptz;
  total_room bigint;
  opened int;       -- by this statement, for the holder: the counts do not see them
  balance int;
  spent int;
  used bigint;
  wait double precision;
  gap double precision;
  code text; setting text; allowed numeric;
BEGIN
  SELECT s.updated_at, s.counts_users, coalesce(s."maintenanceMode", false) AS maintenance,
         coalesce(s."chargeCredits", false) AS charges, s."maxConcurrentJobs" AS total, s."maxJobsPerUser" AS open_most,
         s."maxJobsPerHour" AS hour_most, s."rateLimitRequestsPerMinute" AS rate, coalesce(s.burst, 10) AS burst,
         s."maxStoragePerUserGB" AS gigabytes
  INTO conf
  FROM (SELECT c.updated_at, l.*, coalesce(l."maxJobsPerUser", l."maxJobsPerHour", l."rateLimitRequestsPerMinute",
                                           l."maxStoragePerUserGB") IS NOT NULL AS counts_users
        FROM system_config c CROSS JOIN LATERAL jsonb_to_record(c.config) AS l(
          "maintenanceMode" boolean, "chargeCredits" boolean, "maxConcurrentJobs" int, "maxJobsPerUser" int,
          "maxJobsPerHour" int, "rateLimitRequestsPerMinute" int, burst int, "maxStoragePerUserGB" numeric)) s;
  refusals := '{}';
  charging := coalesce(conf.charges, false);
  IF conf.maintenance THEN
    SELECT coalesce(jsonb_object_agg(g.submission, jsonb_build_object('code', 'maintenance', 'setting', 'maintenanceMode')), '{}')
    INTO refusals FROM unnest(submissions, exempt) AS g(submission, free) WHERE NOT g.free;
    RETURN;
  END IF;
  IF NOT coalesce(conf.counts_users OR charging OR conf.total IS NOT NULL, false) THEN
    RETURN;
  END IF;
  IF conf.total IS NOT NULL THEN
    PERFORM pg_advisory_xact_lock(hashtextextended('ourvidz.admit', 0));
    total_room := conf.total - (SELECT count(*) FROM (SELECT FROM job_queue LIMIT conf.total) some_open);
  END IF;

  FOR one IN
    SELECT * FROM unnest(submissions, owners, jobs, credits, exempt) AS g(submission, owner, n, price, free)
    UNION ALL SELECT NULL, NULL, NULL, NULL, NULL  -- the end, at which the last user's row is written
    ORDER BY owner NULLS LAST, submission
  LOOP
    IF holder IS DISTINCT FROM one.owner THEN
      IF holder IS NOT NULL AND conf.counts_users THEN
        UPDATE ourvidz.user_quotas
        SET rate_at = quota.rate_at, hour_room = quota.hour_room,
            stored_bytes = quota.stored_bytes, stored_at = quota.stored_at, counted_under = conf.updated_at
        WHERE user_id = holder;
      END IF;
      IF spent > 0 THEN
        UPDATE profiles SET token_balance = token_balance - spent WHERE id = holder;
      END IF;
      EXIT WHEN one.owner IS NULL;
      holder := one.owner; opened := 0; spent := 0;
      IF conf.counts_users THEN
        SELECT * INTO quota FROM ourvidz.user_quotas WHERE user_id = holder FOR UPDATE;
        IF NOT FOUND THEN
          INSERT INTO ourvidz.user_quotas (user_id) VALUES (holder) ON CONFLICT DO NOTHING;
          SELECT * INTO quota FROM ourvidz.user_quotas WHERE user_id = holder FOR UPDATE;
        END IF;
        IF quota.counted_under IS DISTINCT FROM conf.updated_at THEN
          quota.hour_room := 0; quota.stored_at := NULL;
        END IF;
      END IF;
      IF charging THEN
        SELECT token_balance INTO balance FROM profiles WHERE id = holder FOR NO KEY UPDATE;
      END IF;
    END IF;

    moment := clock_timestamp(); code := NULL; wait := NULL; allowed := NULL;
    IF NOT one.free THEN
      IF conf.rate IS NOT NULL THEN
        gap := 60.0 / conf.rate;
        wait := extract(epoch FROM quota.rate_at - moment) - (conf.burst - 1) * gap;
        IF wait > 0 THEN
          code := 'rate_limited'; setting := 'rateLimitRequestsPerMinute'; allowed := conf.rate;
        END IF;
      END IF;
      IF code IS NULL AND anew AND conf.hour_most IS NOT NULL AND quota.hour_room < one.n THEN
        SELECT count(*) INTO used FROM usage_logs u
        WHERE u.user_id = holder AND u.created_at > moment - interval '1 hour' AND u.credits_consumed >= 0
          AND u.metadata -> 'retry' IS NULL;
        quota.hour_room := conf.hour_most - used - opened;
        IF quota.hour_room < one.n THEN
          code := 'hourly_limit'; setting := 'maxJobsPerHour'; allowed := conf.hour_most;
          -- when as many have left the hour as are too many; past those that are counted stand those of this statement
          wait := CASE WHEN one.n <= conf.hour_most THEN coalesce((
            SELECT extract(epoch FROM u.created_at + interval '1 hour' - moment) FROM usage_logs u
            WHERE u.user_id = holder AND u.created_at > moment - interval '1 hour' AND u.credits_consumed >= 0
              AND u.metadata -> 'retry' IS NULL
            ORDER BY u.created_at LIMIT 1 OFFSET one.n - quota.hour_room - 1), 3600) END;
        END IF;
      END IF;
      IF code IS NULL AND conf.open_most < one.n + opened
           + coalesce((SELECT o.jobs FROM ourvidz.open_jobs o WHERE o.user_id = holder), 0) THEN
        code := 'user_limit'; setting := 'maxJobsPerUser'; allowed := conf.open_most;
        wait := CASE WHEN one.n <= conf.open_most THEN ourvidz.next_end(holder) END;
      END IF;
      IF code IS NULL AND total_room < one.n THEN
        code := 'concurrent_limit'; setting := 'maxConcurrentJobs'; allowed := conf.total;
        wait := CASE WHEN one.n <= conf.total THEN ourvidz.next_end(NULL) END;
      END IF;
      IF code IS NULL AND conf.gigabytes IS NOT NULL THEN
        -- how large the files of a job will be is not known, so that a sum of a minute ago is good enough; a full one is
        -- counted again, as its owner may have made room
        IF quota.stored_at IS NULL OR quota.stored_at < moment - interval '1 minute'
           OR quota.stored_bytes >= conf.gigabytes * 1e9 THEN
          quota.stored_bytes := ourvidz.stored_bytes(holder); quota.stored_at := moment;
        END IF;
        IF quota.stored_bytes >= conf.gigabytes * 1e9 THEN
          code := 'storage_limit'; setting := 'maxStoragePerUserGB'; allowed := conf.gigabytes;
          wait := (SELECT extract(epoch FROM min(a.expires_at) - moment) FROM workspace_assets a
                   WHERE a.user_id = holder AND a.expires_at > moment);
        END IF;
      END IF;
      IF code IS NULL AND charging AND balance - spent < one.price THEN
        code := 'credits_exhausted'; setting := 'token_balance'; allowed := balance - spent; wait := NULL;
      END IF;
    END IF;

    IF code IS NOT NULL THEN
      refusals := refusals || jsonb_build_object(one.submission, jsonb_build_object(
        'code', code, 'setting', setting, 'allowed', allowed, 'needed', CASE WHEN code = 'credits_exhausted' THEN one.price ELSE one.n END,
        'retry_after', wait));
    ELSE
      IF NOT one.free AND conf.rate IS NOT NULL THEN
        quota.rate_at := greatest(coalesce(quota.rate_at, moment), moment) + make_interval(secs => gap);
      END IF;
      IF NOT one.free AND charging THEN
        spent := spent + one.price::int;
      END IF;
      opened := opened + one.n;
      quota.hour_room := quota.hour_room - CASE WHEN anew THEN one.n ELSE 0 END;
      total_room := total_room - one.n;
    END IF;
  END LOOP;
END $$;

-- ---------------------------------------------------------------------------------------------------------- the log

-- Every act of an admin on what all users depend on, and on what is somebody else's, told in the log: which row, and
-- which columns, never what they hold. What the API and the seeding write comes under no claims, and tells of itself.
-- A trigger with an argument stands on what users own; there only an admin's act on the rows of others is told, or on
-- those that are nobody's.
CREATE OR REPLACE FUNCTION ourvidz.audit_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
  actor uuid := ourvidz.uid();
  kind text := CASE TG_TABLE_SCHEMA WHEN 'lora' THEN 'lora.' ELSE '' END || TG_TABLE_NAME;
  before jsonb := '{}';
  after jsonb := '{}';
  written jsonb;
  owner uuid;
BEGIN
  IF actor IS NULL THEN
    RETURN NULL;
  END IF;
  IF TG_OP <> 'INSERT' THEN before := to_jsonb(OLD); END IF;
  IF TG_OP <> 'DELETE' THEN after := to_jsonb(NEW); END IF;
  IF TG_NARGS > 0 THEN
    written := CASE TG_OP WHEN 'INSERT' THEN after ELSE before END;
    CASE
      WHEN kind = 'scenes' AND written ->> 'project_id' IS NOT NULL THEN
        SELECT user_id INTO owner FROM projects WHERE id = (written ->> 'project_id')::uuid;
      WHEN kind = 'character_scenes' AND written ->> 'character_id' IS NOT NULL THEN
        SELECT user_id INTO owner FROM characters WHERE id = (written ->> 'character_id')::uuid;
      WHEN kind = 'lora.trait_detection_accuracy' AND written ->> 'generation_id' IS NOT NULL THEN
        SELECT user_id INTO owner FROM lora.user_generations WHERE id = (written ->> 'generation_id')::int;
      ELSE
        SELECT written ->> TG_ARGV[0] INTO owner;
    END CASE;
    -- not found: it goes with what it hung on, of which there is a row of its own
    IF NOT FOUND OR owner = actor OR NOT has_role(actor, 'admin') THEN
      RETURN NULL;
    END IF;
  END IF;
  INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata)
  VALUES (actor, kind || '.' || lower(TG_OP), kind, coalesce(after ->> 'id', before ->> 'id'),
          jsonb_build_object('columns', (
            SELECT coalesce(jsonb_agg(key ORDER BY key), '[]')
            FROM (SELECT jsonb_object_keys(before || after) AS key) keys
            WHERE before -> key IS DISTINCT FROM after -> key AND key <> 'updated_at')));
  RETURN NULL;
END $$;

DO $$
DECLARE rule record;
BEGIN
  FOR rule IN SELECT * FROM (VALUES
    ('model_test_results', NULL::text), ('admin_development_progress', NULL), ('lora.training_runs', NULL),
    ('lora.epoch_results', NULL), ('lora.caption_versions', NULL), ('lora.caption_versions_detailed', NULL),
    ('lora.caption_reviews', NULL), ('lora.test_prompts', NULL), ('lora.prompt_test_results', NULL),
    ('lora.unmatched_test_outputs', NULL),
    -- with the column of the owner; what has none is its owner's whom it hangs on
    ('projects', 'user_id'), ('user_collections', 'user_id'), ('characters', 'user_id'), ('scenes', 'creator_id'),
    ('character_scenes', 'user_id'), ('lora.user_generations', 'user_id'), ('lora.trait_detection_accuracy', 'user_id')
  ) AS rules (tab, owner) LOOP
    EXECUTE format('CREATE TRIGGER audited AFTER INSERT OR UPDATE OR DELETE ON %s
                    FOR EACH ROW EXECUTE FUNCTION ourvidz.audit_change(%s)', rule.tab, coalesce(quote_literal(rule.owner), ''));
  END LOOP;
END $$;

-- An entry of the audit log: in one's own name, or as an admin in anybody's. What a client tells is told as `client.`
-- and its action, an admin's too, so that nobody's word passes for what this system did.
CREATE OR REPLACE FUNCTION log_user_activity(
  p_user_id uuid, p_action text, p_resource_type text DEFAULT NULL, p_resource_id text DEFAULT NULL,
  p_metadata jsonb DEFAULT '{}', p_ip_address inet DEFAULT NULL, p_user_agent text DEFAULT NULL) RETURNS uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE entry uuid;
BEGIN
  IF NOT (coalesce(p_user_id = ourvidz.uid(), false) OR ourvidz.administers()) THEN
    RAISE insufficient_privilege USING MESSAGE = 'the log of somebody else';
  END IF;
  IF length(p_action) NOT BETWEEN 1 AND 100 OR length(p_resource_type) > 100 OR length(p_resource_id) > 200
     OR length(p_user_agent) > 1000 OR octet_length(p_metadata::text) > 16384 THEN
    RAISE check_violation USING MESSAGE = 'an entry of the log is too long, or its action empty';
  END IF;
  IF current_setting('role') NOT IN ('none', 'service_role') THEN
    p_action := 'client.' || p_action;
  END IF;
  INSERT INTO user_activity_log (user_id, action, resource_type, resource_id, metadata, ip_address, user_agent)
  VALUES (p_user_id, p_action, p_resource_type, p_resource_id, coalesce(p_metadata, '{}'), p_ip_address, p_user_agent)
  RETURNING id INTO entry;
  RETURN entry;
END $$;

-- Erasures that users may have logged before: this system's say who asked, and are an admin's, the user's own or nobody's.
UPDATE user_activity_log SET action = 'client.' || action
WHERE action = 'user.erased' AND NOT (
  metadata ? 'asked_by' AND (user_id IS NULL OR user_id::text = resource_id OR has_role(user_id, 'admin')));
