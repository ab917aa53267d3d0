-- The two views of the paper on the portal, as it defines them, for comparison with ours.

-- name: job_enhancement_analysis
-- Was wrong in nothing but what it shows of an open job: its state is known to the queue.
SELECT
    j.id, j.user_id, j.job_type, j.model_type, j.status, j.enhancement_strategy, j.original_prompt, j.enhanced_prompt,
    j.enhancement_time_ms, j.quality_rating, j.quality_improvement, j.created_at, j.completed_at,
    EXTRACT(EPOCH FROM (j.completed_at - j.created_at)) as generation_time_seconds,
    CASE
        WHEN j.enhancement_strategy = 'qwen' THEN 'Qwen Only'
        WHEN j.enhancement_strategy = 'compel' THEN 'Compel Only'
        WHEN j.enhancement_strategy = 'hybrid' THEN 'Hybrid (Both)'
        ELSE 'No Enhancement'
    END as enhancement_display_name
FROM current_jobs j
WHERE j.created_at >= NOW() - INTERVAL '30 days';

-- name: enhancement_effectiveness
-- Was wrong: no strategy and 'none' stood apart; open and cancelled jobs counted as failures; four stars of five were
-- compared with a rating of ten; unrated jobs counted as not good.
SELECT
    COALESCE(enhancement_strategy, 'none') as enhancement_strategy,
    COUNT(*) as total_jobs,
    AVG(quality_rating) as avg_quality,
    AVG(quality_improvement) as avg_improvement,
    AVG(enhancement_time_ms) as avg_enhancement_time,
    COUNT(CASE WHEN status = 'completed' THEN 1 END) * 100.0
      / NULLIF(COUNT(CASE WHEN status IN ('completed', 'failed') THEN 1 END), 0) as success_rate,
    COUNT(CASE WHEN quality_rating >= 8.0 THEN 1 END) * 100.0 / NULLIF(COUNT(quality_rating), 0) as high_quality_rate
FROM jobs
WHERE created_at >= NOW() - INTERVAL '7 days'
GROUP BY 1;
