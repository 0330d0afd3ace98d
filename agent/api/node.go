// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"fmt"
	"sort"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/tenant"
)

func imageToProto(i runtime.Image) *nodev1.Image {
	return &nodev1.Image{Reference: i.Name, Digest: i.Digest, SizeBytes: i.SizeBytes, CreatedNs: unixNano(i.Created)}
}

// PullImage implements nodev1.NodeServer.
func (s *Server) PullImage(ctx context.Context, req *nodev1.PullImageRequest) (*nodev1.PullImageResponse, error) {
	if err := operator(ctx, "pull images"); err != nil {
		return nil, err
	}
	if req.GetReference() == "" {
		return nil, status.Error(codes.InvalidArgument, "name an image")
	}
	img, err := s.cfg.Images.Pull(ctx, req.GetReference(), req.GetPlainHttp())
	if err != nil {
		return nil, failure(err)
	}
	return &nodev1.PullImageResponse{Image: imageToProto(img)}, nil
}

// ListImages implements nodev1.NodeServer.
func (s *Server) ListImages(ctx context.Context, _ *nodev1.ListImagesRequest) (*nodev1.ListImagesResponse, error) {
	if _, err := caller(ctx); err != nil {
		return nil, err
	}
	imgs, err := s.cfg.Images.Images(ctx)
	if err != nil {
		return nil, failure(err)
	}
	out := &nodev1.ListImagesResponse{}
	for _, i := range imgs {
		out.Images = append(out.Images, imageToProto(i))
	}
	return out, nil
}

// NodeInfo implements nodev1.NodeServer. Warnings name sandboxes of every
// tenant, so only root reads them.
func (s *Server) NodeInfo(ctx context.Context, _ *nodev1.NodeInfoRequest) (*nodev1.NodeInfoResponse, error) {
	c, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	info, err := s.cfg.NodeInfo(ctx)
	if err != nil {
		return nil, failure(err)
	}
	if info.Degraded, info.Auditing, info.Blocked, err = s.health(); err != nil {
		return nil, failure(err)
	}
	if c.UID == 0 {
		return info, nil
	}
	if n := len(info.Warnings); n > 0 {
		info.Warnings = []string{fmt.Sprintf("%d, which root of this node can read", n)}
	}
	if info.Spool != nil {
		info.Spool.LastError = ""
	}
	return info, nil
}

// Usage implements nodev1.NodeServer.
func (s *Server) Usage(ctx context.Context, req *nodev1.UsageRequest) (*nodev1.UsageResponse, error) {
	c, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	only := ""
	if req.GetRef() != "" {
		rec, _, err := s.find(ctx, req.GetRef())
		if err != nil {
			return nil, err
		}
		only = rec.ID
	}
	in := within(req.GetTenant(), s.mayAct(c))
	marks := s.cfg.Usage()
	out := &nodev1.UsageResponse{}
	for _, rec := range s.cfg.Sandboxes.List() {
		mark, ok := marks[rec.ID]
		if !ok || !in(rec) || only != "" && only != rec.ID {
			continue
		}
		for _, t := range mark.Totals() {
			out.Rows = append(out.Rows, &nodev1.UsageRow{
				Tenant: string(rec.Spec.Tenant), Sandbox: rec.ID, SandboxName: rec.Spec.Name,
				Meter: t.Meter, Total: t.Total, StartNs: unixNano(rec.Started), EndNs: unixNano(t.Until),
			})
		}
	}
	sort.SliceStable(out.Rows, func(i, j int) bool {
		a, b := out.Rows[i], out.Rows[j]
		if a.Tenant != b.Tenant {
			return a.Tenant < b.Tenant
		}
		if a.Sandbox != b.Sandbox {
			return a.Sandbox < b.Sandbox
		}
		return a.Meter < b.Meter
	})
	return out, nil
}

func quotaToProto(q tenant.Quota) *nodev1.Quota {
	return &nodev1.Quota{CpuMillis: q.CPUMillis, MemoryBytes: q.MemoryBytes, Pids: q.PIDs, Sandboxes: q.Sandboxes}
}

// ListTenants implements nodev1.NodeServer.
func (s *Server) ListTenants(ctx context.Context, _ *nodev1.ListTenantsRequest) (*nodev1.ListTenantsResponse, error) {
	c, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	may := s.mayAct(c)
	out := &nodev1.ListTenantsResponse{}
	for _, t := range s.cfg.Sandboxes.Tenants().All() {
		if !may(t.Path) {
			continue
		}
		row := &nodev1.Tenant{
			Path: string(t.Path), Limit: quotaToProto(t.Quota),
			InUse: quotaToProto(s.cfg.Sandboxes.InUse(t.Path)), File: t.File,
		}
		if t.Policy != nil {
			for _, r := range t.Policy.Rules {
				row.Rules = append(row.Rules, r.Name)
			}
		}
		out.Tenants = append(out.Tenants, row)
	}
	return out, nil
}

// Reload implements nodev1.NodeServer.
func (s *Server) Reload(ctx context.Context, _ *nodev1.ReloadRequest) (*nodev1.ReloadResponse, error) {
	if err := operator(ctx, "reload the tenants"); err != nil {
		return nil, err
	}
	tenants, updated, err := s.cfg.Reload(ctx)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "reload refused: "+strings.ToValidUTF8(err.Error(), "?"))
	}
	return &nodev1.ReloadResponse{Tenants: uint32(tenants), SandboxesUpdated: uint32(updated)}, nil
}
