-- name: seed_template(enhancer_model, use_case, content_mode, template_name, system_prompt, token_limit, job_type, target_model, quality, description)!
-- A template of the product, unless the operator has one of that name already.
INSERT INTO prompt_templates (enhancer_model, use_case, content_mode, template_name, system_prompt, token_limit, job_type,
                              target_model, quality, description)
VALUES (:enhancer_model, :use_case, :content_mode, :template_name, :system_prompt, :token_limit, :job_type, :target_model,
        :quality, :description)
ON CONFLICT (enhancer_model, use_case, content_mode, template_name) DO NOTHING;

-- name: list_templates(use_case)
SELECT template_name, use_case, content_mode, system_prompt, token_limit, job_type, target_model, quality, version
FROM prompt_templates WHERE is_active AND use_case = :use_case ORDER BY template_name, content_mode;

-- name: seed_negative(model_type, content_mode, generation_mode, name, negative_prompt, priority)!
INSERT INTO negative_prompts (model_type, content_mode, generation_mode, name, negative_prompt, priority)
VALUES (:model_type, :content_mode, :generation_mode, :name, :negative_prompt, :priority)
ON CONFLICT (model_type, content_mode, generation_mode, name) DO NOTHING;

-- name: list_negatives()
SELECT model_type, content_mode, generation_mode, name, negative_prompt, priority FROM negative_prompts
WHERE is_active ORDER BY priority, name;

-- name: read_config()$
SELECT config FROM system_config WHERE id = 1;
