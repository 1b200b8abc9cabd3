BEGIN TRANSACTION;
CREATE TABLE audit_log (
	seq INTEGER NOT NULL, 
	timestamp FLOAT NOT NULL, 
	actor VARCHAR NOT NULL, 
	event VARCHAR NOT NULL, 
	subject VARCHAR NOT NULL, 
	details TEXT NOT NULL, 
	previous_hash VARCHAR(64) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	PRIMARY KEY (seq)
);
INSERT INTO "audit_log" VALUES(1,1.7954518700549726486e+09,'urza','blueprint.submitted','bde52c17acd295684e99060dc6f1b2cdeda058e3b83bbd38e3a6514c47073879','{"design":"low_rank","graph":"1d3db916890462bbf13afb3e216d16f0e20a8afc06527ee239d9a3c529e2a93d"}','0000000000000000000000000000000000000000000000000000000000000000','4ec3b8300192c29897305863f293fd94f527d2f91ced31b979a7e03a203b76e8');
INSERT INTO "audit_log" VALUES(2,1.79545187007029104228e+09,'tezzeret','kernel.published','d61935730d277d45c6186821212226a68f26cef2b729ec3b478fe6ca5093d01e','{"blueprint":"bde52c17acd295684e99060dc6f1b2cdeda058e3b83bbd38e3a6514c47073879","files":{"graph.json":"1d3db916890462bbf13afb3e216d16f0e20a8afc06527ee239d9a3c529e2a93d","params.safetensors":"a1723e1b63f1170dbed2702358852d366318dfce06f82e86f2ade162162459e3"}}','4ec3b8300192c29897305863f293fd94f527d2f91ced31b979a7e03a203b76e8','c8bc3f9535d197b39d63420022f1849d9aa6a09324b962051c789f4a2e7d52ff');
INSERT INTO "audit_log" VALUES(3,1.7954518700791509151e+09,'urza','blueprint.submitted','791ff921165ef0ff09da72dde4d32f90a93315873e9c56ac879de598d602eb96','{"design":"gated","graph":"958796ca251257b984ff4caf76c05e2a81a3bf2bd023cf03f5fadb6c9e290182"}','c8bc3f9535d197b39d63420022f1849d9aa6a09324b962051c789f4a2e7d52ff','0f24cd8807a0731203aa33f7a8ba4f03b0b9bfabf85ff0165acfcf268e2d6dea');
INSERT INTO "audit_log" VALUES(4,1.79545187008116126055e+09,'tezzeret','blueprint.status','bde52c17acd295684e99060dc6f1b2cdeda058e3b83bbd38e3a6514c47073879','{"log":"","source":"UNVALIDATED","target":"COMPILING"}','0f24cd8807a0731203aa33f7a8ba4f03b0b9bfabf85ff0165acfcf268e2d6dea','874668c95bdfe00b14b729b6ce6be5044c3bf6e31354aabb3bef11ac97f6f355');
INSERT INTO "audit_log" VALUES(5,1.79545187008493685723e+09,'tezzeret','blueprint.status','bde52c17acd295684e99060dc6f1b2cdeda058e3b83bbd38e3a6514c47073879','{"log":"","source":"COMPILING","target":"COMPILED"}','874668c95bdfe00b14b729b6ce6be5044c3bf6e31354aabb3bef11ac97f6f355','635d1f9cecf922f453cf9fc46b65ba058cdaa7b322f636e05ca16a737eb0df37');
INSERT INTO "audit_log" VALUES(6,1.79545187009046649934e+09,'tezzeret','blueprint.status','791ff921165ef0ff09da72dde4d32f90a93315873e9c56ac879de598d602eb96','{"log":"pass 1","source":"UNVALIDATED","target":"COMPILING"}','635d1f9cecf922f453cf9fc46b65ba058cdaa7b322f636e05ca16a737eb0df37','df5659f0040693fedc664ea6d04ed8668eabdf236618429d6e666d74b65863bb');
INSERT INTO "audit_log" VALUES(7,1.79545187009927558895e+09,'urabrask','kernel.reported','d61935730d277d45c6186821212226a68f26cef2b729ec3b478fe6ca5093d01e','{"key":"03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8","replaces":null,"report":"9c1b6328c9da87e4e1f040da68b81ee19cdd882b923ec098a40db2bd32131cd3","status":"VALIDATED"}','df5659f0040693fedc664ea6d04ed8668eabdf236618429d6e666d74b65863bb','2b7d3deb716b809dd4edec086d5735028455e46b3cbbc3e6603cd5838dca99e8');
INSERT INTO "audit_log" VALUES(8,1.79545187012157249446e+09,'urabrask','kernel.reported','d61935730d277d45c6186821212226a68f26cef2b729ec3b478fe6ca5093d01e','{"key":"03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8","replaces":"9c1b6328c9da87e4e1f040da68b81ee19cdd882b923ec098a40db2bd32131cd3","report":"ad43d4efed7499e1c25c79e694c913a4303f9e33cdcca8b8e221ea9a092aeac0","status":"VALIDATED"}','2b7d3deb716b809dd4edec086d5735028455e46b3cbbc3e6603cd5838dca99e8','ca5eff4ac94d064c348c7e20447edc39fcde1ac8b7333177880e09dd5e28b49d');
INSERT INTO "audit_log" VALUES(9,1.7954518701374504566e+09,'urza','blueprint.submitted','1f4fd2979da9f3f0abd764f24ca14051cd179d895ebb30471d948dd3091695f1','{"design":"pending","graph":"6b60ce09b53461bd0836c9bb6016270a6d26c6f2566bcaebc86268f850eb8446"}','ca5eff4ac94d064c348c7e20447edc39fcde1ac8b7333177880e09dd5e28b49d','b5150c1b0fc5d093ce0c433bd8401f553b85a859b2e9959bb7e87f3d9c94f199');
INSERT INTO "audit_log" VALUES(10,1795451870.17389,'tezzeret','kernel.published','393a9dd3ccbc8da7a1642f315aab073b5191b4c9c3ad8374b9a920dcfd6b8cf8','{"blueprint":"1f4fd2979da9f3f0abd764f24ca14051cd179d895ebb30471d948dd3091695f1","files":{"graph.json":"6b60ce09b53461bd0836c9bb6016270a6d26c6f2566bcaebc86268f850eb8446","params.safetensors":"0ad70035d4ec6ab95e4004fa9b622bee1bd4ff7755b07ac5fb901ad14b955741"}}','b5150c1b0fc5d093ce0c433bd8401f553b85a859b2e9959bb7e87f3d9c94f199','d34446e7a24a50e2a1c635c065aa9dda0db413436690dad611692db2b482925b');
INSERT INTO "audit_log" VALUES(11,1.79545187018671917921e+09,'tamiyo','adaptation.reported','1b66b170b8b403078b298ca02b824ba664b2dd1c00ac19119c55183c71fcf577','{"artifact":"d61935730d277d45c6186821212226a68f26cef2b729ec3b478fe6ca5093d01e","outcome":"FOSSILIZED"}','d34446e7a24a50e2a1c635c065aa9dda0db413436690dad611692db2b482925b','2b21bc2eed52fcbd84ae3a26e774adb4df8f516e35720c27c89022a77427f546');
CREATE TABLE blueprints (
	position INTEGER NOT NULL, 
	blueprint_id VARCHAR(64) NOT NULL, 
	contract TEXT NOT NULL, 
	status VARCHAR NOT NULL, 
	log TEXT NOT NULL, 
	PRIMARY KEY (position), 
	UNIQUE (blueprint_id)
);
INSERT INTO "blueprints" VALUES(1,'bde52c17acd295684e99060dc6f1b2cdeda058e3b83bbd38e3a6514c47073879','{"design":{"builder":"esper.blueprints:LowRank","hparams":{"rank":2},"name":"low_rank"},"dtype":"float32","flops_per_sample":96,"graph_digest":"1d3db916890462bbf13afb3e216d16f0e20a8afc06527ee239d9a3c529e2a93d","num_parameters":48,"parents":[],"site":{"act_shape":[null,4],"channel_dim":1,"dilation":[],"host":"Linear","inp_shape":[null,8],"kernel_size":[],"padding":[],"stride":[]}}','COMPILED','');
INSERT INTO "blueprints" VALUES(2,'791ff921165ef0ff09da72dde4d32f90a93315873e9c56ac879de598d602eb96','{"design":{"builder":"esper.blueprints:LowRank","hparams":{"rank":2},"name":"gated"},"dtype":"float32","flops_per_sample":96,"graph_digest":"958796ca251257b984ff4caf76c05e2a81a3bf2bd023cf03f5fadb6c9e290182","num_parameters":48,"parents":[],"site":{"act_shape":[null,4],"channel_dim":1,"dilation":[],"host":"Linear","inp_shape":[null,8],"kernel_size":[],"padding":[],"stride":[]}}','COMPILING','pass 1');
INSERT INTO "blueprints" VALUES(3,'1f4fd2979da9f3f0abd764f24ca14051cd179d895ebb30471d948dd3091695f1','{"design":{"builder":"esper.blueprints:LowRank","hparams":{"rank":2},"name":"pending"},"dtype":"float32","flops_per_sample":96,"graph_digest":"6b60ce09b53461bd0836c9bb6016270a6d26c6f2566bcaebc86268f850eb8446","num_parameters":48,"parents":[],"site":{"act_shape":[null,4],"channel_dim":1,"dilation":[],"host":"Linear","inp_shape":[null,8],"kernel_size":[],"padding":[],"stride":[]}}','UNVALIDATED','');
CREATE TABLE field_reports (
	position INTEGER NOT NULL, 
	report_digest VARCHAR(64) NOT NULL, 
	artifact_id VARCHAR(64) NOT NULL, 
	blueprint_id VARCHAR(64) NOT NULL, 
	contract TEXT NOT NULL, 
	PRIMARY KEY (position), 
	UNIQUE (report_digest), 
	FOREIGN KEY(artifact_id) REFERENCES kernels (artifact_id), 
	FOREIGN KEY(blueprint_id) REFERENCES blueprints (blueprint_id)
);
INSERT INTO "field_reports" VALUES(1,'1b66b170b8b403078b298ca02b824ba664b2dd1c00ac19119c55183c71fcf577','d61935730d277d45c6186821212226a68f26cef2b729ec3b478fe6ca5093d01e','bde52c17acd295684e99060dc6f1b2cdeda058e3b83bbd38e3a6514c47073879','{"artifact_id":"d61935730d277d45c6186821212226a68f26cef2b729ec3b478fe6ca5093d01e","blueprint_id":"bde52c17acd295684e99060dc6f1b2cdeda058e3b83bbd38e3a6514c47073879","ended_epoch":9,"evaluation":null,"num_parameters":48,"outcome":"FOSSILIZED","reason":"contribution 0.02 +- 0.004","seed_id":["blocks.2.mlp",0],"started_epoch":3}');
CREATE TABLE kernels (
	position INTEGER NOT NULL, 
	artifact_id VARCHAR(64) NOT NULL, 
	blueprint_id VARCHAR(64) NOT NULL, 
	manifest TEXT NOT NULL, 
	site_digest VARCHAR(64) NOT NULL, 
	dtype VARCHAR NOT NULL, 
	device VARCHAR NOT NULL, 
	num_parameters INTEGER NOT NULL, 
	status VARCHAR NOT NULL, 
	report_digest VARCHAR(64), 
	signature VARCHAR, 
	tags TEXT NOT NULL, 
	latency_us FLOAT, 
	memory_bytes INTEGER, 
	risk_score FLOAT, 
	PRIMARY KEY (position), 
	UNIQUE (artifact_id), 
	FOREIGN KEY(blueprint_id) REFERENCES blueprints (blueprint_id)
);
INSERT INTO "kernels" VALUES(1,'d61935730d277d45c6186821212226a68f26cef2b729ec3b478fe6ca5093d01e','bde52c17acd295684e99060dc6f1b2cdeda058e3b83bbd38e3a6514c47073879','{"blueprint_id":"bde52c17acd295684e99060dc6f1b2cdeda058e3b83bbd38e3a6514c47073879","design":{"builder":"esper.blueprints:LowRank","hparams":{"rank":2},"name":"low_rank"},"device":"cpu","dtype":"float32","files":{"graph.json":"1d3db916890462bbf13afb3e216d16f0e20a8afc06527ee239d9a3c529e2a93d","params.safetensors":"a1723e1b63f1170dbed2702358852d366318dfce06f82e86f2ade162162459e3"},"flops_per_sample":96,"format_version":1,"num_parameters":48,"pipeline":"FAST","site":{"act_shape":[null,4],"channel_dim":1,"dilation":[],"host":"Linear","inp_shape":[null,8],"kernel_size":[],"padding":[],"stride":[]},"torch_version":"2.13"}','18d80d974ddfe1e3df49a6711343fdb5ba25902d70c9f951637f3adebec6c700','float32','cpu',48,'VALIDATED','ad43d4efed7499e1c25c79e694c913a4303f9e33cdcca8b8e221ea9a092aeac0','0097b2c6934937c1dc72e193001b6452e0575d9ee5836686ff304702339b2cf0e7fc648bc7ca51b186bf48275e9f7eaf0ca4ed007aaa281b2f1453541b62cd0e','["fast","small"]',12.5,4096,0.25);
INSERT INTO "kernels" VALUES(2,'393a9dd3ccbc8da7a1642f315aab073b5191b4c9c3ad8374b9a920dcfd6b8cf8','1f4fd2979da9f3f0abd764f24ca14051cd179d895ebb30471d948dd3091695f1','{"blueprint_id":"1f4fd2979da9f3f0abd764f24ca14051cd179d895ebb30471d948dd3091695f1","design":{"builder":"esper.blueprints:LowRank","hparams":{"rank":2},"name":"pending"},"device":"cpu","dtype":"float32","files":{"graph.json":"6b60ce09b53461bd0836c9bb6016270a6d26c6f2566bcaebc86268f850eb8446","params.safetensors":"0ad70035d4ec6ab95e4004fa9b622bee1bd4ff7755b07ac5fb901ad14b955741"},"flops_per_sample":96,"format_version":1,"num_parameters":48,"pipeline":"FAST","site":{"act_shape":[null,4],"channel_dim":1,"dilation":[],"host":"Linear","inp_shape":[null,8],"kernel_size":[],"padding":[],"stride":[]},"torch_version":"2.13"}','18d80d974ddfe1e3df49a6711343fdb5ba25902d70c9f951637f3adebec6c700','float32','cpu',48,'PENDING_BENCHMARKING',NULL,NULL,'[]',NULL,NULL,NULL);
CREATE TABLE reports (
	position INTEGER NOT NULL, 
	artifact_id VARCHAR(64) NOT NULL, 
	status VARCHAR NOT NULL, 
	report_digest VARCHAR(64) NOT NULL, 
	signature VARCHAR NOT NULL, 
	PRIMARY KEY (position), 
	FOREIGN KEY(artifact_id) REFERENCES kernels (artifact_id)
);
INSERT INTO "reports" VALUES(1,'d61935730d277d45c6186821212226a68f26cef2b729ec3b478fe6ca5093d01e','VALIDATED','9c1b6328c9da87e4e1f040da68b81ee19cdd882b923ec098a40db2bd32131cd3','25956e9a94e4c14f75473c3fb04da7d7d9fad6025932e31e08861d5dd0da952f5c246de48a72b727859fba0e08558240f1e869d3c048b6aa2de45f1b05df5101');
INSERT INTO "reports" VALUES(2,'d61935730d277d45c6186821212226a68f26cef2b729ec3b478fe6ca5093d01e','VALIDATED','ad43d4efed7499e1c25c79e694c913a4303f9e33cdcca8b8e221ea9a092aeac0','0097b2c6934937c1dc72e193001b6452e0575d9ee5836686ff304702339b2cf0e7fc648bc7ca51b186bf48275e9f7eaf0ca4ed007aaa281b2f1453541b62cd0e');
CREATE TABLE schema_version (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "schema_version" VALUES(1);
CREATE TRIGGER audit_log_refuses_UPDATE BEFORE UPDATE ON audit_log BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_log_refuses_DELETE BEFORE DELETE ON audit_log BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE INDEX kernels_by_fit ON kernels (status, site_digest, dtype, device);
CREATE INDEX ix_reports_artifact_id ON reports (artifact_id);
COMMIT;
