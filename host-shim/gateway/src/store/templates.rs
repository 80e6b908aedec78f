//! Templates of teams, their builds and tags.
//!
//! A tag is a name for a build that is ready; it moves in the transaction in which the build becomes ready, so a name never
//! stands for half a template.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use serde::{Deserialize, Serialize};
use template::TemplateName;

use super::{Store, StoreError};
use crate::builds::{BuildId, BuildLimits, TemplateId};
use crate::identity::TeamId;

/// Builds of a template that have ended and that no tag names: as many are kept, for their logs.
const KEPT_BUILDS: i64 = 20;

/// A template of a team.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateRecord {
    /// Its id.
    pub id: TemplateId,
    /// Whose it is.
    pub team: TeamId,
    /// What its team calls it.
    pub name: TemplateName,
    /// When it was first asked for.
    pub created_at: Timestamp,
}

/// How far a build is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BuildStage {
    /// Its client sends the files.
    Waiting,
    /// It has its place in the queue.
    Queued,
    /// It is being built.
    Building,
    /// Its template can be started.
    Ready,
    /// It failed.
    Error,
}

impl BuildStage {
    /// Whether it may still become ready.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Waiting | Self::Queued | Self::Building)
    }
}

/// Why a build failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildReason {
    /// In a sentence.
    pub message: String,
    /// `base`, a step's number from 1, or `finalize`; none where it was no step's fault.
    pub step: Option<String>,
}

/// A build as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildRecord {
    /// Its id.
    pub id: BuildId,
    /// The template that it is a build of.
    pub template: TemplateId,
    /// Whose it is.
    pub team: TeamId,
    /// How far it is.
    pub stage: BuildStage,
    /// Tags that it gets when it is ready.
    pub tags: Vec<String>,
    /// Virtual CPUs of its sandboxes.
    pub cpus: u32,
    /// Their RAM in MiB.
    pub memory_mib: u64,
    /// Their scratch disk in MiB.
    pub disk_mib: u64,
    /// How often it was begun: again after a gateway that ended in the midst of it.
    pub attempts: u32,
    /// When it was asked for.
    pub requested_at: Timestamp,
    /// When it came to an end.
    pub finished_at: Option<Timestamp>,
    /// Why it failed.
    pub reason: Option<BuildReason>,
    /// The digest of what was pushed to the registry.
    pub digest: Option<String>,
}

/// A tag of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagRecord {
    /// The tag.
    pub tag: String,
    /// The build that it names.
    pub build: BuildId,
    /// Since when.
    pub created_at: Timestamp,
}

/// What came of the wish for a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requested {
    /// It waits for its files.
    Begun(TemplateRecord),
    /// The team has as many templates as it may have.
    Templates,
    /// The team has as many builds that have not ended.
    Builds,
}

/// A template with what is to be shown of it.
#[derive(Clone, Debug)]
pub struct TemplateSummary {
    /// The template.
    pub template: TemplateRecord,
    /// The build that its tag `default` names, else the newest.
    pub build: BuildRecord,
    /// Builds that are known of it.
    pub builds: u32,
}

impl Store {
    /// Begins a build: `build` makes the record for the template's id.
    pub async fn request_build(
        &self,
        team: &TeamId,
        name: &TemplateName,
        fresh: TemplateId,
        limits: BuildLimits,
        build: impl FnOnce(&TemplateId) -> BuildRecord + Send + 'static,
    ) -> Result<Requested, StoreError> {
        let (team, name) = (team.clone(), name.clone());
        self.with(move |db| {
            let change = db.transaction()?;
            let active: u32 = change.query_row(
                "SELECT count(*) FROM builds JOIN templates ON templates.id = builds.template
                 WHERE templates.team = ? AND builds.stage IN ('waiting', 'queued', 'building')",
                [&team.0],
                |row| row.get(0),
            )?;
            if active >= limits.queued {
                return Ok(Requested::Builds);
            }
            let template = match template(&change, &team, name.as_str())? {
                Some(template) => template,
                None => {
                    let count = "SELECT count(*) FROM templates WHERE team = ?";
                    let count: u32 = change.query_row(count, [&team.0], |row| row.get(0))?;
                    if count >= limits.templates {
                        return Ok(Requested::Templates);
                    }
                    let made = TemplateRecord { id: fresh, team, name, created_at: Timestamp::now() };
                    change.execute(
                        "INSERT INTO templates (id, team, name, created_at) VALUES (?, ?, ?, ?)",
                        params![made.id.0, made.team.0, made.name.as_str(), made.created_at.to_string()],
                    )?;
                    made
                }
            };
            put(&change, &build(&template.id))?;
            prune(&change, &template.id)?;
            change.commit()?;
            Ok(Requested::Begun(template))
        })
        .await
    }

    /// Keeps what has become of a build. Whether it is still wanted.
    pub async fn put_build(&self, build: &BuildRecord) -> Result<bool, StoreError> {
        let build = build.clone();
        self.with(move |db| {
            let known = "SELECT 1 FROM builds WHERE id = ?";
            if db.query_row(known, [&build.id.0], |_| Ok(())).optional()?.is_none() {
                return Ok(false);
            }
            put(db, &build)?;
            Ok(true)
        })
        .await
    }

    /// Keeps that a build is ready, and gives it its tags. Whether it is still wanted.
    pub async fn publish_build(&self, build: &BuildRecord) -> Result<bool, StoreError> {
        let build = build.clone();
        self.with(move |db| {
            let change = db.transaction()?;
            let known = "SELECT 1 FROM builds WHERE id = ?";
            if change.query_row(known, [&build.id.0], |_| Ok(())).optional()?.is_none() {
                return Ok(false);
            }
            put(&change, &build)?;
            tag(&change, &build.template, &build.id, &build.tags)?;
            change.commit()?;
            Ok(true)
        })
        .await
    }

    /// A build of the team.
    pub async fn build(
        &self,
        team: &TeamId,
        template: &TemplateId,
        build: &BuildId,
    ) -> Result<Option<BuildRecord>, StoreError> {
        let (team, template, build) = (team.clone(), template.clone(), build.clone());
        self.with(move |db| {
            let mut query = db.prepare_cached(
                "SELECT builds.record FROM builds JOIN templates ON templates.id = builds.template
                 WHERE builds.id = ? AND builds.template = ? AND templates.team = ?",
            )?;
            let found = query.query_row([&build.0, &template.0, &team.0], |row| row.get::<_, String>(0));
            found.optional()?.map(|text| record(&text)).transpose()
        })
        .await
    }

    /// Every build, those that were begun first first.
    pub async fn builds(&self) -> Result<Vec<BuildRecord>, StoreError> {
        self.with(|db| {
            let mut query = db.prepare("SELECT record FROM builds ORDER BY number")?;
            let rows = query.query_map([], |row| row.get::<_, String>(0))?;
            rows.map(|row| record(&row?)).collect()
        })
        .await
    }

    /// The builds that tags name.
    pub async fn tagged_builds(&self) -> Result<Vec<BuildId>, StoreError> {
        self.with(|db| {
            let mut query = db.prepare("SELECT DISTINCT build FROM template_tags")?;
            let rows = query.query_map([], |row| Ok(BuildId(row.get(0)?)))?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// The team's template of that name or id.
    pub async fn template(&self, team: &TeamId, name: &str) -> Result<Option<TemplateRecord>, StoreError> {
        let (team, name) = (team.clone(), name.to_owned());
        self.with(move |db| template(db, &team, &name)).await
    }

    /// The team's template of that name or id, with the build that the tag names.
    pub async fn tagged(
        &self,
        team: &TeamId,
        name: &str,
        tag: &str,
    ) -> Result<Option<(TemplateRecord, BuildRecord)>, StoreError> {
        let (team, name, tag) = (team.clone(), name.to_owned(), tag.to_owned());
        self.with(move |db| {
            let Some(template) = template(db, &team, &name)? else { return Ok(None) };
            let build = tagged(db, &template.id, &tag)?;
            Ok(build.map(|build| (template, build)))
        })
        .await
    }

    /// The team's templates, by name.
    pub async fn templates(&self, team: &TeamId) -> Result<Vec<TemplateSummary>, StoreError> {
        let team = team.clone();
        self.with(move |db| {
            let mut query = db.prepare("SELECT * FROM templates WHERE team = ? ORDER BY name")?;
            let templates: Vec<_> = query.query_map([&team.0], template_row)?.collect::<Result<_, _>>()?;
            let mut found = Vec::with_capacity(templates.len());
            for template in templates {
                let template = template?;
                let newest = "SELECT record FROM builds WHERE template = ? ORDER BY number DESC LIMIT 1";
                let newest = db.query_row(newest, [&template.id.0], |row| row.get::<_, String>(0));
                let build = match tagged(db, &template.id, crate::builds::DEFAULT_TAG)? {
                    Some(build) => build,
                    None => match newest.optional()? {
                        Some(text) => record(&text)?,
                        None => continue,
                    },
                };
                let count = "SELECT count(*) FROM builds WHERE template = ?";
                let builds = db.query_row(count, [&template.id.0], |row| row.get(0))?;
                found.push(TemplateSummary { template, build, builds });
            }
            Ok(found)
        })
        .await
    }

    /// The tags of a template, by name.
    pub async fn tags(&self, template: &TemplateId) -> Result<Vec<TagRecord>, StoreError> {
        let template = template.clone();
        self.with(move |db| {
            let mut query = db.prepare(
                "SELECT tag, build, created_at FROM template_tags WHERE template = ? ORDER BY tag",
            )?;
            let rows = query.query_map([&template.0], |row| {
                let (tag, build) = (row.get(0)?, BuildId(row.get(1)?));
                Ok(TagRecord { tag, build, created_at: super::timestamp(row, 2)? })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Gives more tags to the build that `source` names. `None` where it names none.
    pub async fn assign_tags(
        &self,
        template: &TemplateId,
        source: &str,
        tags: &[String],
    ) -> Result<Option<BuildId>, StoreError> {
        let (template, source, tags) = (template.clone(), source.to_owned(), tags.to_vec());
        self.with(move |db| {
            let change = db.transaction()?;
            let Some(build) = tagged(&change, &template, &source)? else { return Ok(None) };
            tag(&change, &template, &build.id, &tags)?;
            change.commit()?;
            Ok(Some(build.id))
        })
        .await
    }

    /// Takes tags away; how many there were of them.
    pub async fn remove_tags(&self, template: &TemplateId, tags: &[String]) -> Result<usize, StoreError> {
        let (template, tags) = (template.clone(), tags.to_vec());
        self.with(move |db| {
            let change = db.transaction()?;
            let mut removed = 0;
            for tag in &tags {
                let delete = "DELETE FROM template_tags WHERE template = ? AND tag = ?";
                removed += change.execute(delete, params![template.0, tag])?;
            }
            change.commit()?;
            Ok(removed)
        })
        .await
    }

    /// Forgets a template with its builds and tags; its builds that had not ended.
    pub async fn delete_template(&self, template: &TemplateId) -> Result<Vec<BuildId>, StoreError> {
        let template = template.clone();
        self.with(move |db| {
            let change = db.transaction()?;
            let active: Vec<BuildId> = {
                let mut query = change.prepare(
                    "SELECT id FROM builds WHERE template = ? AND stage IN ('waiting', 'queued', 'building')",
                )?;
                let rows = query.query_map([&template.0], |row| Ok(BuildId(row.get(0)?)))?;
                rows.collect::<Result<_, _>>()?
            };
            change.execute("DELETE FROM templates WHERE id = ?", [&template.0])?;
            change.commit()?;
            Ok(active)
        })
        .await
    }

    /// What the team's builds may take.
    pub async fn build_limits(&self, team: &TeamId) -> Result<BuildLimits, StoreError> {
        let team = team.clone();
        self.with(move |db| {
            let query = "SELECT * FROM build_limits WHERE team = ?";
            let found = db.query_row(query, [&team.0], |row| {
                Ok(BuildLimits {
                    at_once: row.get("at_once")?,
                    queued: row.get("queued")?,
                    templates: row.get("templates")?,
                    uploads_mib: row.get("uploads_mib")?,
                    minutes: row.get("minutes")?,
                })
            });
            Ok(found.optional()?.unwrap_or_default())
        })
        .await
    }

    /// Changes what the team's builds may take.
    pub async fn set_build_limits(&self, team: &TeamId, limits: BuildLimits) -> Result<(), StoreError> {
        let team = team.clone();
        self.with(move |db| {
            let BuildLimits { at_once, queued, templates, uploads_mib, minutes } = limits;
            db.execute(
                "INSERT OR REPLACE INTO build_limits (team, at_once, queued, templates, uploads_mib, minutes)
                 VALUES (?, ?, ?, ?, ?, ?)",
                params![team.0, at_once, queued, templates, uploads_mib, minutes],
            )?;
            Ok(())
        })
        .await
    }
}

fn template(db: &Connection, team: &TeamId, name: &str) -> Result<Option<TemplateRecord>, StoreError> {
    // A name comes before an id that is spelled the same.
    let mut query = db.prepare_cached(
        "SELECT * FROM templates WHERE team = ?1 AND (name = ?2 OR id = ?2) ORDER BY name = ?2 DESC LIMIT 1",
    )?;
    query.query_row([&team.0, name], template_row).optional()?.transpose()
}

fn template_row(row: &Row<'_>) -> rusqlite::Result<Result<TemplateRecord, StoreError>> {
    let (id, team, name) = (TemplateId(row.get(0)?), TeamId(row.get(1)?), row.get::<_, String>(2)?);
    let created_at = super::timestamp(row, 3)?;
    let name = name.parse().map_err(|error| StoreError::Corrupt(format!("the template {id}: {error}")));
    Ok(name.map(|name| TemplateRecord { id, team, name, created_at }))
}

fn tagged(db: &Connection, template: &TemplateId, tag: &str) -> Result<Option<BuildRecord>, StoreError> {
    let mut query = db.prepare_cached(
        "SELECT builds.record FROM template_tags JOIN builds ON builds.id = template_tags.build
         WHERE template_tags.template = ? AND template_tags.tag = ?",
    )?;
    let found = query.query_row([&template.0, tag], |row| row.get::<_, String>(0)).optional()?;
    found.map(|text| record(&text)).transpose()
}

fn record(text: &str) -> Result<BuildRecord, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Corrupt(format!("a build: {error}")))
}

fn put(db: &Connection, build: &BuildRecord) -> Result<(), StoreError> {
    let corrupt = |error| StoreError::Corrupt(format!("the build {}: {error}", build.id));
    let text = serde_json::to_string(build).map_err(corrupt)?;
    let stage = match build.stage {
        BuildStage::Waiting => "waiting",
        BuildStage::Queued => "queued",
        BuildStage::Building => "building",
        BuildStage::Ready => "ready",
        BuildStage::Error => "error",
    };
    db.execute(
        "INSERT INTO builds (id, template, stage, record) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (id) DO UPDATE SET stage = ?3, record = ?4",
        params![build.id.0, build.template.0, stage, text],
    )?;
    Ok(())
}

fn tag(
    change: &Transaction<'_>,
    template: &TemplateId,
    build: &BuildId,
    tags: &[String],
) -> Result<(), StoreError> {
    for tag in tags {
        change.execute(
            "INSERT OR REPLACE INTO template_tags (template, tag, build, created_at) VALUES (?, ?, ?, ?)",
            params![template.0, tag, build.0, Timestamp::now().to_string()],
        )?;
    }
    Ok(())
}

/// Forgets the oldest builds that have ended and that no tag names.
fn prune(change: &Transaction<'_>, template: &TemplateId) -> Result<(), StoreError> {
    change.execute(
        "DELETE FROM builds WHERE id IN (
             SELECT id FROM builds WHERE template = ?1 AND stage IN ('ready', 'error')
             AND id NOT IN (SELECT build FROM template_tags WHERE template = ?1)
             ORDER BY number DESC LIMIT -1 OFFSET ?2)",
        params![template.0, KEPT_BUILDS],
    )?;
    Ok(())
}
