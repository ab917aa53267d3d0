-- What replicas keep of prompt templates and negative prompts is known by the number of this row: an edit makes a new one in
-- its own transaction, so whoever reads the number before the rows never keeps old rows under a new number.

CREATE TABLE ourvidz.prompt_version (
  id boolean PRIMARY KEY DEFAULT true CHECK (id),
  version bigint NOT NULL DEFAULT 1,
  changed_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO ourvidz.prompt_version DEFAULT VALUES;
ALTER TABLE ourvidz.prompt_version ENABLE ROW LEVEL SECURITY;
GRANT SELECT ON ourvidz.prompt_version TO ourvidz_worker;
CREATE POLICY worker ON ourvidz.prompt_version FOR SELECT TO ourvidz_worker USING (true);

-- Whoever may edit the prompts need not have a right to the number.
CREATE FUNCTION ourvidz.prompts_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
BEGIN
  UPDATE ourvidz.prompt_version SET version = version + 1, changed_at = now();
  RETURN NULL;
END $$;
REVOKE EXECUTE ON FUNCTION ourvidz.prompts_changed() FROM PUBLIC;
CREATE TRIGGER prompts_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON prompt_templates
  FOR EACH STATEMENT EXECUTE FUNCTION ourvidz.prompts_changed();
CREATE TRIGGER prompts_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON negative_prompts
  FOR EACH STATEMENT EXECUTE FUNCTION ourvidz.prompts_changed();

-- The strategy of a job is one of four: rules are what stood in where the language model could not, and the job's
-- `enhancement` says so.
UPDATE jobs SET enhancement_strategy = 'none' WHERE enhancement_strategy = 'rule_based';
