//! Jobs on disk: one SQLite file. A job is there whole from the moment its creation is answered; its checkpoint and the
//! reports up to it change in one transaction, so a kill at any moment leaves a point to go on from.
use super::jobs::JobState;
use super::run::{Progress, Report};
use crate::error::{Error, Kind, Result};
use rusqlite::{Connection, OptionalExtension, params};
use std::path::Path;
use std::time::Duration;

/// The file's layout; another number is refused.
const VERSION: i64 = 1;

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS jobs (
        id TEXT PRIMARY KEY,
        created_at INTEGER NOT NULL,   -- microseconds since 1970
        ended_at INTEGER,
        adapter_id TEXT NOT NULL,
        spec TEXT NOT NULL,            -- JSON: settings, card, what to do with the result
        base TEXT NOT NULL,            -- the model that it trains on
        data BLOB NOT NULL,            -- JSON lines
        state TEXT NOT NULL,
        error TEXT NOT NULL DEFAULT '',
        generation INTEGER NOT NULL DEFAULT 0,
        progress TEXT,                 -- JSON of the checkpoint
        checkpoint BLOB                -- safetensors
    ) STRICT;
    CREATE TABLE IF NOT EXISTS reports (
        job TEXT NOT NULL,
        number INTEGER NOT NULL,
        report TEXT NOT NULL,          -- JSON
        PRIMARY KEY (job, number)
    ) STRICT, WITHOUT ROWID;
";

/// A job as it lies on disk, without data and checkpoint.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its name.
    pub id: String,
    /// Microseconds since 1970.
    pub created_at: i64,
    /// The same; none: it has not ended.
    pub ended_at: Option<i64>,
    /// What it trains.
    pub adapter_id: String,
    /// JSON.
    pub spec: String,
    /// What it trains on.
    pub base: String,
    /// Where it is.
    pub state: JobState,
    /// Why it failed.
    pub error: String,
    /// Under which its adapter serves.
    pub generation: u64,
    /// Of the last checkpoint.
    pub progress: Option<Progress>,
}

/// The open file.
pub struct Journal {
    db: Connection,
}

impl Journal {
    /// Opens or makes the file. Only one process may have it open.
    ///
    /// # Errors
    /// `FailedPrecondition` where another process has it, or for a file of another version; `Internal` for the disk.
    pub fn open(path: &Path) -> Result<Self> {
        let at = |e: rusqlite::Error| fault(e).context(path.display());
        let db = Connection::open(path).map_err(at)?;
        db.busy_timeout(Duration::from_millis(500)).map_err(at)?;
        // FULL: what was answered survives a power cut too. EXCLUSIVE: two servers would train every job twice.
        db.execute_batch("PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
            .map_err(at)?;
        let version: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(at)?;
        if version != 0 && version != VERSION {
            let text = format!("{}: layout {version}, this prefixd reads {VERSION}", path.display());
            return Err(Error::precondition(text));
        }
        db.execute_batch(SCHEMA).map_err(at)?;
        db.pragma_update(None, "user_version", VERSION).map_err(at)?;
        Ok(Journal { db })
    }

    /// Stands for a disk that has room for so many pages of 4 KiB.
    #[cfg(test)]
    pub(super) fn limit_pages(&self, pages: u32) {
        self.db.pragma_update(None, "max_page_count", pages).expect("a pragma of SQLite");
    }

    /// Adds a job.
    pub fn create(&mut self, row: &Row, data: &str) -> Result<()> {
        let sql = "INSERT INTO jobs (id, created_at, adapter_id, spec, base, data, state) VALUES (?,?,?,?,?,?,?)";
        let values =
            params![row.id, row.created_at, row.adapter_id, row.spec, row.base, data.as_bytes(), row.state.as_str()];
        self.db.execute(sql, values).map_err(fault)?;
        Ok(())
    }

    /// All jobs, oldest first.
    pub fn jobs(&self) -> Result<Vec<Row>> {
        let sql =
            "SELECT id, created_at, ended_at, adapter_id, spec, base, state, error, generation, progress FROM jobs
             ORDER BY created_at, id";
        let mut statement = self.db.prepare(sql).map_err(fault)?;
        let rows = statement.query_map([], |row| {
            let (state, progress): (String, Option<String>) = (row.get(6)?, row.get(9)?);
            Ok(Row {
                id: row.get(0)?,
                created_at: row.get(1)?,
                ended_at: row.get(2)?,
                adapter_id: row.get(3)?,
                spec: row.get(4)?,
                base: row.get(5)?,
                state: JobState::parse(&state),
                error: row.get(7)?,
                generation: row.get::<_, i64>(8)? as u64,
                progress: progress.and_then(|json| serde_json::from_str(&json).ok()),
            })
        });
        rows.and_then(Iterator::collect).map_err(fault)
    }

    /// A job's examples as JSON lines.
    pub fn data(&self, id: &str) -> Result<String> {
        let bytes: Vec<u8> =
            self.db.query_row("SELECT data FROM jobs WHERE id = ?", [id], |row| row.get(0)).map_err(fault)?;
        String::from_utf8(bytes).map_err(|e| Error::internal(format!("data of job {id}: {e}")))
    }

    /// A job's checkpoint.
    pub fn checkpoint(&self, id: &str) -> Result<Option<Vec<u8>>> {
        let sql = "SELECT checkpoint FROM jobs WHERE id = ?";
        let found = self.db.query_row(sql, [id], |row| row.get(0)).optional();
        Ok(found.map_err(fault)?.flatten())
    }

    /// A job's reports, in order.
    pub fn reports(&self, id: &str) -> Result<Vec<Report>> {
        let mut statement =
            self.db.prepare("SELECT report FROM reports WHERE job = ? ORDER BY number").map_err(fault)?;
        let rows = statement.query_map([id], |row| row.get::<_, String>(0)).map_err(fault)?;
        rows.map(|json| serde_json::from_str(&json.map_err(fault)?).map_err(|e| Error::internal(e.to_string())))
            .collect()
    }

    /// Forgets a job.
    pub fn delete(&mut self, id: &str) -> Result<()> {
        let all = self.db.transaction().map_err(fault)?;
        all.execute("DELETE FROM jobs WHERE id = ?", [id]).map_err(fault)?;
        all.execute("DELETE FROM reports WHERE job = ?", [id]).map_err(fault)?;
        all.commit().map_err(fault)
    }

    /// A job's state; `reports` are those from number `from` on. `checkpoint`: a point to go on from, which they lead to.
    pub fn update(
        &mut self,
        id: &str,
        change: &Change<'_>,
        from: usize,
        reports: &[Report],
        checkpoint: Option<(&Progress, &[u8])>,
    ) -> Result<()> {
        let all = self.db.transaction().map_err(fault)?;
        {
            let sql = "INSERT OR REPLACE INTO reports (job, number, report) VALUES (?,?,?)";
            let mut insert = all.prepare(sql).map_err(fault)?;
            for (i, report) in reports.iter().enumerate() {
                let json = serde_json::to_string(report).map_err(|e| Error::internal(e.to_string()))?;
                insert.execute(params![id, (from + i) as i64, json]).map_err(fault)?;
            }
            let sql = "UPDATE jobs SET state = ?2, error = ?3, generation = ?4, ended_at = ?5 WHERE id = ?1";
            let values = params![id, change.state.as_str(), change.error, change.generation as i64, change.ended_at];
            all.execute(sql, values).map_err(fault)?;
            if let Some((progress, bytes)) = checkpoint {
                let json = serde_json::to_string(progress).map_err(|e| Error::internal(e.to_string()))?;
                let sql = "UPDATE jobs SET progress = ?2, checkpoint = ?3 WHERE id = ?1";
                all.execute(sql, params![id, json, bytes]).map_err(fault)?;
            }
        }
        all.commit().map_err(fault)
    }
}

/// The present columns of a job.
#[derive(Clone, Debug)]
pub struct Change<'a> {
    /// Where it is.
    pub state: JobState,
    /// Why it failed.
    pub error: &'a str,
    /// Under which its adapter serves; 0: under none.
    pub generation: u64,
    /// Microseconds since 1970.
    pub ended_at: Option<i64>,
}

fn fault(e: rusqlite::Error) -> Error {
    use rusqlite::ErrorCode::*;
    let kind = match e.sqlite_error_code() {
        Some(DiskFull) => Kind::ResourceExhausted,
        Some(DatabaseBusy | DatabaseLocked) => {
            return Error::precondition("training jobs: another prefixd has the file open");
        }
        _ => Kind::Internal,
    };
    Error::new(kind, format!("training jobs: {e}"))
}
