-- What users may ask for, and what it costs them. The limits stand in system_config under the names of the
-- specification and are read by the statement that accepts a job, so that a change holds at once; one that is absent or
-- null is off. Whatever is on is checked and taken under a lock on the user's own row: no two requests can take one place.

-- A client that writes the row by REST can't store what would not be understood later.
CREATE FUNCTION ourvidz.is_config(config jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
  SELECT jsonb_typeof(config) = 'object' AND NOT EXISTS (
    SELECT FROM jsonb_each(config) AS given(name, value)
    WHERE value <> 'null' AND NOT CASE
      WHEN name IN ('maxConcurrentJobs', 'maxJobsPerUser', 'maxJobsPerHour', 'rateLimitRequestsPerMinute', 'burst')
        THEN CASE jsonb_typeof(value) WHEN 'number'
               THEN value::numeric BETWEEN 1 AND 1000000 AND value::numeric = trunc(value::numeric) ELSE false END
      WHEN name = 'maxStoragePerUserGB'
        THEN CASE jsonb_typeof(value) WHEN 'number' THEN value::numeric > 0 AND value::numeric <= 1000000 ELSE false END
      WHEN name IN ('maintenanceMode', 'chargeCredits') THEN jsonb_typeof(value) = 'boolean'
      ELSE true END)
$$;
ALTER TABLE system_config ADD CONSTRAINT limits_are_limits CHECK (ourvidz.is_config(config));

-- A charge that was taken from the balance, or a refund, which has negative credits. What is not was only noted.
ALTER TABLE usage_logs ADD COLUMN charged boolean NOT NULL DEFAULT false;

-- How many jobs each user has open. An index of the queue by user would cost every claim a page or more; this costs the
-- acceptance and the end one row of the user. By triggers, so that it is right whoever writes the queue, and in the order of
-- the users, after the fair shares: whoever locks several does it so.
CREATE TABLE ourvidz.open_jobs (
  user_id uuid PRIMARY KEY REFERENCES profiles ON DELETE CASCADE,
  jobs int NOT NULL
) WITH (fillfactor = 50);
ALTER TABLE ourvidz.open_jobs ENABLE ROW LEVEL SECURITY;
INSERT INTO ourvidz.open_jobs (user_id, jobs)
SELECT q.user_id, count(*) FROM job_queue q JOIN profiles p ON p.id = q.user_id GROUP BY q.user_id;

CREATE FUNCTION ourvidz.count_opened() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
  INSERT INTO ourvidz.open_jobs AS o (user_id, jobs)
  SELECT user_id, count(*) FROM opened GROUP BY user_id ORDER BY user_id
  ON CONFLICT (user_id) DO UPDATE SET jobs = o.jobs + excluded.jobs;
  RETURN NULL;
END $$;
CREATE FUNCTION ourvidz.count_closed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE one record;
BEGIN
  -- not by an insert that conflicts: of a user who is being erased the row may be gone
  FOR one IN SELECT user_id, count(*) AS jobs FROM closed GROUP BY user_id ORDER BY user_id LOOP
    UPDATE ourvidz.open_jobs SET jobs = jobs - one.jobs WHERE user_id = one.user_id;
  END LOOP;
  RETURN NULL;
END $$;
REVOKE EXECUTE ON FUNCTION ourvidz.count_opened(), ourvidz.count_closed() FROM PUBLIC;
CREATE TRIGGER job_queue_opened AFTER INSERT ON job_queue REFERENCING NEW TABLE AS opened
  FOR EACH STATEMENT EXECUTE FUNCTION ourvidz.count_opened();
CREATE TRIGGER job_queue_closed AFTER DELETE ON job_queue REFERENCING OLD TABLE AS closed
  FOR EACH STATEMENT EXECUTE FUNCTION ourvidz.count_closed();

CREATE TABLE ourvidz.user_quotas (
  user_id uuid PRIMARY KEY REFERENCES profiles ON DELETE CASCADE,
  -- of the generic cell rate algorithm (ITU-T I.371): when the next request would come if all came evenly
  rate_at timestamptz,
  -- how many jobs may be taken in before those of the last hour are counted again: only an acceptance makes it fewer, so a
  -- count that was right is on the safe side later
  hour_room int NOT NULL DEFAULT 0,
  stored_bytes bigint,
  stored_at timestamptz,
  counted_under timestamptz                   -- system_config.updated_at at the count: other limits, another count
) WITH (fillfactor = 50);
ALTER TABLE ourvidz.user_quotas ENABLE ROW LEVEL SECURITY;

-- The bytes of a user's files that rows speak of: workspace, library and uploads, without thumbnails.
CREATE FUNCTION ourvidz.stored_bytes(owner uuid) RETURNS bigint
LANGUAGE sql STABLE AS $$
  SELECT (coalesce((SELECT sum(file_size_bytes) FROM workspace_assets WHERE user_id = owner), 0)
        + coalesce((SELECT sum(file_size_bytes) FROM user_library WHERE user_id = owner), 0)
        + coalesce((SELECT sum(file_size_bytes) FROM reference_uploads WHERE user_id = owner), 0))::bigint
$$;

-- Seconds until the first running job of a user, or else of all, has taken as long as was predicted; where nothing runs,
-- what is predicted for one of the jobs that wait. At least one.
CREATE FUNCTION ourvidz.next_end(owner uuid) RETURNS double precision
LANGUAGE sql STABLE AS $$
  SELECT greatest(1, coalesce(
    (SELECT coalesce(min(left_over) FILTER (WHERE user_id = owner), min(left_over))
     FROM (SELECT user_id, cost - extract(epoch FROM clock_timestamp() - claimed_at)::float8 AS left_over
           FROM job_queue WHERE state = 'running') runs),
    (SELECT min(cost) FROM (SELECT cost FROM job_queue LIMIT 100) wait)))
$$;

-- Decide which submissions may come in, and take what they need: places, credits. The arrays have an entry for each:
-- its number, its user, how many jobs it has, what they cost, and whether it is exempt (then it is counted, and never
-- refused nor charged). `anew` is false for jobs that were taken in before, which count for no hour. The answer maps the
-- numbers of those that are refused to why.
-- Locks: the system's, then by user the quota and the balance; the accepting statement locks fair shares after these, and
-- the end of a job gives credits back before its share. plpgsql, as each statement in it sees what was committed while
-- it waited for a lock.
CREATE FUNCTION ourvidz.admit(
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
          wait := coalesce((
            SELECT extract(epoch FROM u.created_at + interval '1 hour' - moment) FROM usage_logs u
            WHERE u.user_id = holder AND u.created_at > moment - interval '1 hour' AND u.credits_consumed >= 0
              AND u.metadata -> 'retry' IS NULL
            ORDER BY u.created_at LIMIT 1 OFFSET least(used, one.n - quota.hour_room) - 1), 3600);
        END IF;
      END IF;
      IF code IS NULL AND conf.open_most < one.n + opened
           + coalesce((SELECT o.jobs FROM ourvidz.open_jobs o WHERE o.user_id = holder), 0) THEN
        code := 'user_limit'; setting := 'maxJobsPerUser'; allowed := conf.open_most; wait := ourvidz.next_end(holder);
      END IF;
      IF code IS NULL AND total_room < one.n THEN
        code := 'concurrent_limit'; setting := 'maxConcurrentJobs'; allowed := conf.total; wait := ourvidz.next_end(NULL);
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

-- Give back what jobs were charged, once: what was given back already is no charge any more. In the order of the users,
-- as everybody locks balances. Replicas end jobs, and may not write what they give back.
CREATE FUNCTION ourvidz.refund(job_ids uuid[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE back record;
BEGIN
  FOR back IN
    WITH logged AS (
      INSERT INTO usage_logs (user_id, action, credits_consumed, format, quality, job_id, charged)
      SELECT user_id, 'refund', -sum(credits_consumed), min(format), min(quality), job_id, true
      FROM usage_logs WHERE job_id = ANY (job_ids) AND charged
      GROUP BY user_id, job_id HAVING sum(credits_consumed) > 0
      RETURNING user_id, credits_consumed
    )
    SELECT user_id, -sum(credits_consumed)::int AS credits FROM logged GROUP BY user_id ORDER BY user_id
  LOOP
    UPDATE profiles SET token_balance = token_balance + back.credits WHERE id = back.user_id;
  END LOOP;
END $$;

REVOKE EXECUTE ON FUNCTION ourvidz.admit(int[], uuid[], int[], numeric[], boolean[], boolean), ourvidz.refund(uuid[]),
  ourvidz.stored_bytes(uuid), ourvidz.next_end(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ourvidz.refund(uuid[]) TO ourvidz_worker;
