-- name: tables()
-- The tables and views that clients may know of, with their columns in order.
SELECT n.nspname AS schema, c.relname AS name, CASE c.relkind WHEN 'v' THEN 'view' ELSE 'table' END AS kind,
       c.relrowsecurity AS row_security,
       (SELECT jsonb_agg(jsonb_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
                                            'nullable', NOT a.attnotnull, 'generated', a.attgenerated <> '')
                         ORDER BY a.attnum)
        FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname IN ('public', 'lora') AND c.relkind IN ('r', 'p', 'v') ORDER BY n.nspname, c.relname;

-- name: prompts()^
-- What the active prompt templates and negative prompts are for, and how many there are. `digest` is another one whenever
-- one of them has changed.
SELECT (SELECT count(*) FROM prompt_templates WHERE is_active) AS templates,
       (SELECT count(*) FROM negative_prompts WHERE is_active) AS negatives,
       (SELECT coalesce(array_agg(DISTINCT use_case::text ORDER BY use_case::text), '{}')
        FROM prompt_templates WHERE is_active) AS use_cases,
       (SELECT coalesce(array_agg(DISTINCT target_model ORDER BY target_model), '{}')
        FROM prompt_templates WHERE is_active AND target_model IS NOT NULL) AS models,
       (SELECT coalesce(array_agg(DISTINCT coalesce(model_type, 'any')::text ORDER BY coalesce(model_type, 'any')::text), '{}')
        FROM negative_prompts WHERE is_active) AS negative_models,
       (SELECT encode(sha256(convert_to(coalesce(string_agg(seen, ' ' ORDER BY seen), ''), 'UTF8')), 'hex')
        FROM (SELECT id || ':' || updated_at::text AS seen FROM prompt_templates WHERE is_active
              UNION ALL SELECT id || ':' || updated_at::text FROM negative_prompts WHERE is_active) rows) AS digest,
       now() AS at;
