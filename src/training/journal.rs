//! Jobs on disk: one SQLite file. A job is there whole from the moment its creation is answered; its checkpoint and the
//! reports up to it change in one transaction, so a kill at any moment leaves a point to go on from.
use super::jobs::JobState;
use super::run::{Progress, Report};
use crate::error::{Error, Kind, Result};
use rusqlite::{Connection, OptionalExtension, params};
use std::path::Path;
use std::time::Duration;

/// The file's layout; a later one is refused.
const VERSION: i64 = 2;

/// Of a checkpoint: SQLite takes no larger value, and keeps some bytes of it for itself.
pub const MOST_BYTES: usize = 999_000_000;

/// What changes often is apart from what is large: SQLite writes a row whole.
const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS jobs (
        id TEXT PRIMARY KEY,
        created_at INTEGER NOT NULL,   -- microseconds since 1970
        ended_at INTEGER,
        adapter_id TEXT NOT NULL,
        spec TEXT NOT NULL,            -- JSON: settings, card, what to do with the result
        base TEXT NOT NULL,            -- the model that it trains on
        state TEXT NOT NULL,
        error TEXT NOT NULL DEFAULT '',
        generation INTEGER NOT NULL DEFAULT 0,
        progress TEXT,                 -- JSON of the checkpoint
        starts INTEGER NOT NULL DEFAULT 0  -- by a process, since the job last got further
    ) STRICT;
    CREATE TABLE IF NOT EXISTS data (
        job TEXT PRIMARY KEY,
        lines BLOB NOT NULL            -- JSON lines
    ) STRICT;
    CREATE TABLE IF NOT EXISTS checkpoints (
        job TEXT PRIMARY KEY,
        weights BLOB NOT NULL          -- safetensors
    ) STRICT;
    CREATE TABLE IF NOT EXISTS reports (
        job TEXT NOT NULL,
        number INTEGER NOT NULL,
        report TEXT NOT NULL,          -- JSON
        PRIMARY KEY (job, number)
    ) STRICT, WITHOUT ROWID;
";

/// Layout 1 had data and checkpoint in the job's row, and no `starts`.
const FROM_1: &str = "
    INSERT INTO jobs (id, created_at, ended_at, adapter_id, spec, base, state, error, generation, progress)
        SELECT id, created_at, ended_at, adapter_id, spec, base, state, error, generation, progress FROM jobs_1;
    INSERT INTO data SELECT id, data FROM jobs_1;
    INSERT INTO checkpoints SELECT id, checkpoint FROM jobs_1 WHERE checkpoint IS NOT NULL;
    DROP TABLE jobs_1;
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
    /// How often a process began to train it since it last got further.
    pub starts: u32,
}

/// The open file.
pub struct Journal {
    db: Connection,
}

impl Journal {
    /// Opens or makes the file. Only one process may have it open.
    ///
    /// # Errors
    /// `FailedPrecondition` where another process has it, or for a file of a later version; `ResourceExhausted` for a full disk, `Internal`
    /// for what else it says.
    pub fn open(path: &Path) -> Result<Self> {
        let at = |e: rusqlite::Error| fault(e).context(path.display());
        let db = Connection::open(path).map_err(at)?;
        db.busy_timeout(Duration::from_millis(500)).map_err(at)?;
        // FULL: what was answered survives a power cut too. EXCLUSIVE: two servers would train every job twice.
        db.execute_batch("PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
            .map_err(at)?;
        let version: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(at)?;
        if version > VERSION {
            let text = format!("{}: layout {version}, this prefixd reads {VERSION}", path.display());
            return Err(Error::precondition(text));
        }
        let mut journal = Journal { db };
        journal.lay_out().map_err(at)?;
        Ok(journal)
    }

    /// Makes the tables, of nothing or of an older layout's: all of it or nothing.
    fn lay_out(&mut self) -> rusqlite::Result<()> {
        let all = self.db.transaction()?;
        let sql = "SELECT COUNT(*) FROM pragma_table_info('jobs') WHERE name = 'data'";
        let old = all.query_row(sql, [], |row| row.get::<_, i64>(0))? > 0;
        if old {
            all.execute_batch("ALTER TABLE jobs RENAME TO jobs_1")?;
        }
        all.execute_batch(SCHEMA)?;
        if old {
            all.execute_batch(FROM_1)?;
        }
        all.pragma_update(None, "user_version", VERSION)?;
        all.commit()
    }

    /// Stands for a disk that has room for so many pages of 4 KiB.
    #[cfg(test)]
    pub(super) fn limit_pages(&self, pages: u32) {
        self.db.pragma_update(None, "max_page_count", pages).expect("a pragma of SQLite");
    }

    /// Adds a job.
    pub fn create(&mut self, row: &Row, lines: &str) -> Result<()> {
        let all = self.db.transaction().map_err(fault)?;
        let sql = "INSERT INTO jobs (id, created_at, adapter_id, spec, base, state) VALUES (?,?,?,?,?,?)";
        let values = params![row.id, row.created_at, row.adapter_id, row.spec, row.base, row.state.as_str()];
        all.execute(sql, values).map_err(fault)?;
        all.execute("INSERT INTO data (job, lines) VALUES (?,?)", params![row.id, lines.as_bytes()]).map_err(fault)?;
        all.commit().map_err(fault)
    }

    /// All jobs, oldest first.
    pub fn jobs(&self) -> Result<Vec<Row>> {
        let sql =
            "SELECT id, created_at, ended_at, adapter_id, spec, base, state, error, generation, progress, starts FROM jobs
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
                starts: row.get(10)?,
            })
        });
        rows.and_then(Iterator::collect).map_err(fault)
    }

    /// A job's examples as JSON lines.
    pub fn data(&self, id: &str) -> Result<String> {
        let bytes: Vec<u8> =
            self.db.query_row("SELECT lines FROM data WHERE job = ?", [id], |row| row.get(0)).map_err(fault)?;
        String::from_utf8(bytes).map_err(|e| Error::internal(format!("data of job {id}: {e}")))
    }

    /// A job's checkpoint.
    pub fn checkpoint(&self, id: &str) -> Result<Option<Vec<u8>>> {
        let sql = "SELECT weights FROM checkpoints WHERE job = ?";
        self.db.query_row(sql, [id], |row| row.get(0)).optional().map_err(fault)
    }

    /// A job's reports from number `from` on, in order, `most` of them.
    pub fn reports(&self, id: &str, from: usize, most: usize) -> Result<Vec<Report>> {
        let sql = "SELECT report FROM reports WHERE job = ? AND number >= ? ORDER BY number LIMIT ?";
        let mut statement = self.db.prepare(sql).map_err(fault)?;
        let rows = statement.query_map(params![id, from as i64, most as i64], |row| row.get::<_, String>(0));
        rows.map_err(fault)?.map(|json| report(&json.map_err(fault)?)).collect()
    }

    /// How many reports of a job there are.
    pub fn count(&self, id: &str) -> Result<usize> {
        let sql = "SELECT COALESCE(MAX(number) + 1, 0) FROM reports WHERE job = ?";
        let count: i64 = self.db.query_row(sql, [id], |row| row.get(0)).map_err(fault)?;
        Ok(count.max(0) as usize)
    }

    /// A job's last report of a kind: [`Happened`](super::run::Happened)'s variant by its name.
    pub fn last(&self, id: &str, kind: &str) -> Result<Option<Report>> {
        let sql = "SELECT report FROM reports WHERE job = ? AND json_type(report, '$.what.' || ?) IS NOT NULL
                   ORDER BY number DESC LIMIT 1";
        let json = self.db.query_row(sql, params![id, kind], |row| row.get::<_, String>(0));
        json.optional().map_err(fault)?.map(|json| report(&json)).transpose()
    }

    /// A process is about to train a job.
    pub fn begin(&mut self, id: &str) -> Result<()> {
        self.db.execute("UPDATE jobs SET starts = starts + 1 WHERE id = ?", [id]).map_err(fault)?;
        Ok(())
    }

    /// The process that began a job ends, and not by it.
    pub fn forgive(&mut self, id: &str) -> Result<()> {
        self.db.execute("UPDATE jobs SET starts = starts - 1 WHERE id = ? AND starts > 0", [id]).map_err(fault)?;
        Ok(())
    }

    /// Forgets a job.
    pub fn delete(&mut self, id: &str) -> Result<()> {
        let all = self.db.transaction().map_err(fault)?;
        for (table, key) in [("jobs", "id"), ("data", "job"), ("checkpoints", "job"), ("reports", "job")] {
            all.execute(&format!("DELETE FROM {table} WHERE {key} = ?"), [id]).map_err(fault)?;
        }
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
            let sql =
                "UPDATE jobs SET state = ?2, error = ?3, generation = ?4, ended_at = ?5, starts = ?6 WHERE id = ?1";
            let Change { state, error, generation, ended_at, starts } = change;
            let values = params![id, state.as_str(), error, *generation as i64, ended_at, starts];
            all.execute(sql, values).map_err(fault)?;
            if let Some((progress, bytes)) = checkpoint {
                let json = serde_json::to_string(progress).map_err(|e| Error::internal(e.to_string()))?;
                all.execute("UPDATE jobs SET progress = ?2 WHERE id = ?1", params![id, json]).map_err(fault)?;
                let sql = "INSERT OR REPLACE INTO checkpoints (job, weights) VALUES (?,?)";
                all.execute(sql, params![id, bytes]).map_err(fault)?;
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
    /// See [`Row::starts`].
    pub starts: u32,
}

fn report(json: &str) -> Result<Report> {
    serde_json::from_str(json).map_err(|e| Error::internal(format!("training jobs: a report: {e}")))
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
