//! `AdapterService`: adapters in and out of service.
use super::call::Call;
use super::convert;
use super::drain::Drain;
use super::proto::{self, adapter_service_server::AdapterService};
use super::upload::Uploads;
use crate::adapter::{AdapterId, Generation};
use crate::engine::loader::AdapterLoader;
use crate::error::{Error, Result};
use crate::training::jobs::Jobs;
use tonic::{Request, Response, Status, Streaming};

/// Adapters on a page where the request does not say, and the most it may ask for.
const PAGE: (u32, u32) = (100, 1000);

/// Loads, replaces and removes adapters.
#[derive(Clone)]
pub struct Adapters {
    /// Does it.
    pub loader: AdapterLoader,
    /// Takes uploads in.
    pub uploads: Uploads,
    /// Those whose adapters are on their way, if this server trains.
    pub jobs: Option<Jobs>,
    /// Closed while the server drains.
    pub drain: Drain,
}

#[tonic::async_trait]
impl AdapterService for Adapters {
    async fn load_adapter(
        &self,
        request: Request<proto::LoadAdapterRequest>,
    ) -> Result<Response<proto::LoadAdapterResponse>, Status> {
        let call = Call::work("LoadAdapter", request.metadata(), &self.drain)?;
        let proto::LoadAdapterRequest { adapter_id, pinned } = request.into_inner();
        let result = call.within(async {
            let id = AdapterId::parse(&adapter_id)?;
            let adapter = self.loader.load(&id, pinned).await?;
            let adapter = convert::adapter(&adapter, proto::AdapterState::Ready, &self.loader);
            Ok(proto::LoadAdapterResponse { adapter: Some(adapter) })
        });
        let result = result.await;
        call.finish(result)
    }

    async fn upload_adapter(
        &self,
        request: Request<Streaming<proto::UploadAdapterRequest>>,
    ) -> Result<Response<proto::UploadAdapterResponse>, Status> {
        let call = Call::work("UploadAdapter", request.metadata(), &self.drain)?;
        let result = call.within(async {
            let adapter = self.uploads.take(request.into_inner(), &self.loader, self.jobs.as_ref()).await?;
            let adapter = convert::adapter(&adapter, proto::AdapterState::Ready, &self.loader);
            Ok(proto::UploadAdapterResponse { adapter: Some(adapter) })
        });
        let result = result.await;
        call.finish(result)
    }

    async fn unload_adapter(
        &self,
        request: Request<proto::UnloadAdapterRequest>,
    ) -> Result<Response<proto::UnloadAdapterResponse>, Status> {
        let call = Call::work("UnloadAdapter", request.metadata(), &self.drain)?;
        let result = call.within(self.unloaded(request.into_inner())).await;
        call.finish(result)
    }

    async fn get_adapter(
        &self,
        request: Request<proto::GetAdapterRequest>,
    ) -> Result<Response<proto::GetAdapterResponse>, Status> {
        let call = Call::new("GetAdapter", request.metadata());
        let status = AdapterId::parse(&request.get_ref().adapter_id).and_then(|id| self.loader.registry().get(&id));
        call.finish(
            status.map(|status| proto::GetAdapterResponse { adapter: Some(convert::status_of(status, &self.loader)) }),
        )
    }

    async fn list_adapters(
        &self,
        request: Request<proto::ListAdaptersRequest>,
    ) -> Result<Response<proto::ListAdaptersResponse>, Status> {
        let call = Call::new("ListAdapters", request.metadata());
        let result = self.page(request.get_ref());
        call.finish(result)
    }
}

impl Adapters {
    async fn unloaded(&self, message: proto::UnloadAdapterRequest) -> Result<proto::UnloadAdapterResponse> {
        let id = AdapterId::parse(&message.adapter_id)?;
        let removed = self.loader.unload(&id, message.generation.map(Generation), message.delete).await?;
        let state = proto::AdapterState::Unloading;
        let adapter = match removed {
            Some(adapter) => convert::adapter(&adapter, state, &self.loader),
            None => proto::Adapter { adapter_id: message.adapter_id, state: state.into(), ..Default::default() },
        };
        Ok(proto::UnloadAdapterResponse { adapter: Some(adapter) })
    }

    /// The token of a page is the last id of the page before: pages stay whole while adapters come and go.
    fn page(&self, message: &proto::ListAdaptersRequest) -> Result<proto::ListAdaptersResponse> {
        let (usual, most) = PAGE;
        let size = match message.page_size {
            0 => usual,
            n if n <= most => n,
            n => return Err(Error::invalid("page_size", n, format!("must be from 0 to {most}"))),
        };
        let after = match message.page_token.as_str() {
            "" => None,
            token => Some(AdapterId::parse(token).map_err(|_| {
                Error::invalid("page_token", format!("{token:?}"), "must be a `next_page_token` of this server")
            })?),
        };
        let mut rest = self.loader.registry().list();
        rest.retain(|status| after.as_ref().is_none_or(|after| status.id > *after));
        let more = rest.len() > size as usize;
        rest.truncate(size as usize);
        let next = rest.last().filter(|_| more).map(|status| status.id.to_string());
        Ok(proto::ListAdaptersResponse {
            adapters: rest.into_iter().map(|status| convert::status_of(status, &self.loader)).collect(),
            next_page_token: next.unwrap_or_default(),
        })
    }
}
