//! Images that are too long to decode as a whole: the tiles that are finished, which are kept on disk, and the folder
//! of an unfinished image, from which a run that was interrupted resumes.

mod sink;
mod work;

pub use sink::{INDEX_FILE, Index, Layout, Sink, Tile, is_folder};
pub use work::{Record, Verified, Work, check_owner, is_begun, remove_empty};
